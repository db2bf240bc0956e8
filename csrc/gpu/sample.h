// sample for a GPU: one token a row, the same token as gptcore/sampling.py gives, by whole numbers; no sort.
// A logit's weight is floor(e^((z - best) / temperature) 2^40); integer sums do not depend on their order, so atomic
// additions are as good as any. Logits are compared as order-preserving 32-bit keys. The edge of top-k, and then of
// top-p, is the largest key such that what is there from it on reaches a share: a histogram over the distance from the
// best finds the interval, four histograms over eight bits each the key in it. The draw halves the row again and again,
// a piece a warp, until one token is left.
#pragma once
#include "numbers.h"

namespace gptcore::gpu {

struct SampleArgs {
  Sampling s;
  int64_t n_row;
};

constexpr uint64_t kOne = uint64_t(1) << 40;         // the weight of a most likely token
constexpr uint32_t kNothing = 0x007fffff;            // the key of -inf
constexpr int kRoom = 4096;                          // candidates for an edge that are looked at in shared memory

// Keys are ordered as logits are; -0 and 0 have one key.
DEVICE uint32_t key_of(float x) {
  const uint32_t b = bits_of(plus(x, 0.0f));
  return b >> 31 ? ~b : b | 0x80000000u;
}
DEVICE float logit_of(uint32_t key) { return float_of(key >> 31 ? key & 0x7fffffffu : ~key); }

// floor(e^x 2^40) for x <= 0; kept word for word as in sampling.py, each product and sum rounded apart.
DEVICE uint64_t exp_weight(float x) {
  x = x < -100.0f ? -100.0f : x;
  const float t = plus(times(x, float(1.44269504)), kRound), n = plus(t, -kRound);
  const float r = plus(plus(x, -times(n, float(0.693359375))), times(n, float(2.12194440e-4)));
  float p = plus(times(float(1.9875691500e-4), r), float(1.3981999507e-3));
  p = plus(times(p, r), float(8.3334519073e-3)), p = plus(times(p, r), float(4.1665795894e-2));
  p = plus(times(p, r), float(1.6666665459e-1)), p = plus(times(p, r), float(5.0000001201e-1));
  p = plus(plus(times(p, times(r, r)), r), 1.0f);
  p = float_of(bits_of(p) + (bits_of(t) << 23));     // times 2^n: n is in t's last bits
  return x > -80.0f ? uint64_t(times(p, float(kOne))) : 0;
}

// 64 random bits from a seed and a position.  Philox4x32-10, Salmon et al. 2011.
DEVICE uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t x0 = uint32_t(position), x1 = uint32_t(position >> 32), x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(x0) * 0xD2511F53u, b = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(b >> 32) ^ x1 ^ k0, x1 = uint32_t(b), x2 = uint32_t(a >> 32) ^ x3 ^ k1, x3 = uint32_t(a);
  }
  return uint64_t(x1) << 32 | x0;
}

DEVICE uint64_t high_product(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a) * b >> 64); }

// T is how logits are stored, N the threads of a block: 256 or more.
template <class T, int N>
struct Sample {
  static constexpr int kThreads = N, kWarps = N / kWarp;

  struct Shared {
    uint64_t bin[N];
    uint64_t warp[N / 32];
    uint64_t before;                                 // of the bin where a share is reached
    uint32_t key[kRoom];
    uint32_t n_key;
    int picked;
  };

  struct Row {
    const T* z;
    int64_t n;
    float best, inverse;

    DEVICE float logit(int64_t i) const { return widen(z[i]); }
    DEVICE uint64_t weight(float x) const { return exp_weight(times(plus(x, -best), inverse)); }
    // 28 below the best a weight is 0: what lies further shares the last bin.
    DEVICE int bin(float x) const {
      const float far = times(times(plus(best, -x), inverse), N / 28.0f);
      return far < float(N - 1) ? int(far) : N - 1;
    }
  };

  DEVICE static void body(const SampleArgs& args, Shared& s) {
    const Sampling& settings = args.s;
    const int64_t b = block_index();
    const int64_t token = draw_row(settings, b, s);
    if (thread_index() == 0) settings.tokens[b] = token;
  }

 private:
  DEVICE static int64_t draw_row(const Sampling& settings, int64_t b, Shared& s) {
    Row row = {static_cast<const T*>(settings.logits) + b * settings.logits_stride, settings.n_vocab, 0.0f,
               settings.temperature_inverse};
    const uint64_t first = best_of(row, s);          // its key, and the complement of its index
    if (first == ~uint64_t(0) || first >> 32 == kNothing) return -1;
    if (row.inverse == 0) return ~uint32_t(first);
    row.best = logit_of(uint32_t(first >> 32));
    uint32_t edge = 0;
    if (settings.top_k > 0 && settings.top_k < row.n) {
      const auto one = [](float, uint32_t) { return uint64_t(1); };
      edge = reach(row, s, one, [&](uint64_t) { return uint64_t(settings.top_k); });
    }
    if (settings.top_p < 1) {
      const auto kept = [&](float x, uint32_t key) { return key >= edge ? row.weight(x) : 0; };
      const uint32_t nucleus = reach(row, s, kept, [&](uint64_t all) {
        const uint64_t share = uint64_t(double(all) * settings.top_p);
        return share < 1 ? 1 : share;
      });
      edge = nucleus > edge ? nucleus : edge;
    }
    const uint64_t share = uint64_t(__builtin_ceil(settings.min_p * double(kOne)));
    const uint64_t bits = philox(uint64_t(settings.seed[b * settings.seed_stride]),
                                 uint64_t(settings.position[b * settings.position_stride]));
    return draw(row, s, bits, [&](float x) {
      const uint64_t w = key_of(x) >= edge ? row.weight(x) : 0;
      return w >= share ? w : 0;
    });
  }

  // The largest key, and among equals the lowest index, as key 2^32 + ~index; all ones for a NaN or +inf.
  DEVICE static uint64_t best_of(const Row& row, Shared& s) {
    uint64_t best = 0;
    for (int64_t i = thread_index(); i < row.n; i += N) {
      const float x = row.logit(i);
      const uint64_t here = x < kInfinity ? uint64_t(key_of(x)) << 32 | ~uint32_t(i) : ~uint64_t(0);
      best = here > best ? here : best;
    }
    for (int mask = kWarp / 2; mask; mask /= 2) {
      const uint64_t other = shuffle_xor(best, mask);
      best = other > best ? other : best;
    }
    if (thread_index() % kWarp == 0) s.warp[thread_index() / kWarp] = best;
    sync();
    for (int w = 0; w < kWarps; ++w) best = s.warp[w] > best ? s.warp[w] : best;
    sync();
    return best;
  }

  // The largest key such that the mass from it on reaches want(all mass); 0, all keys, if even all do not.
  template <class Mass, class Want>
  DEVICE static uint32_t reach(const Row& row, Shared& s, Mass mass, Want want_of) {
    s.bin[thread_index()] = 0;
    if (thread_index() == 0) s.n_key = 0;
    sync();
    for (int64_t i = thread_index(); i < row.n; i += N) {
      const float x = row.logit(i);
      if (const uint64_t m = mass(x, key_of(x))) atomic_add(&s.bin[row.bin(x)], m);
    }
    sync();
    uint64_t want = want_of(all_bins(s));
    if (!pick(s, &want)) return 0;
    const int interval = s.picked;
    for (int64_t i = thread_index(); i < row.n; i += N) {
      const float x = row.logit(i);
      if (row.bin(x) != interval) continue;
      const uint32_t at = atomic_add(&s.n_key, 1);
      if (at < kRoom) s.key[at] = key_of(x);
    }
    sync();
    uint32_t prefix = 0;
    const bool few = s.n_key <= kRoom;               // else the row is read again, four times
    for (int shift = 24; shift >= 0; shift -= 8) {
      s.bin[thread_index()] = 0;
      sync();
      for (int64_t i = thread_index(); i < (few ? int64_t(s.n_key) : row.n); i += N) {
        const float x = few ? logit_of(s.key[i]) : row.logit(i);
        const uint32_t key = key_of(x);
        if ((few || row.bin(x) == interval) && uint64_t(key) >> (shift + 8) == uint64_t(prefix) >> (shift + 8))
          atomic_add(&s.bin[255 - (key >> shift & 255)], mass(x, key));
      }
      sync();
      pick(s, &want);
      prefix |= uint32_t(255 - s.picked) << shift;
      sync();
    }
    return prefix;
  }

  DEVICE static uint64_t all_bins(Shared& s) {
    uint64_t sum = s.bin[thread_index()];
    for (int mask = kWarp / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread_index() % kWarp == 0) s.warp[thread_index() / kWarp] = sum;
    sync();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += s.warp[w];
    sync();
    return sum;
  }

  // s.picked becomes the first bin at which the running sum reaches want, which is lowered by what lies before it.
  DEVICE static bool pick(Shared& s, uint64_t* want) {
    const uint64_t own = s.bin[thread_index()];
    uint64_t sum = own;
    for (int by = 1; by < kWarp; by *= 2) {
      const uint64_t other = shuffle_up(sum, by);
      if (thread_index() % kWarp >= by) sum += other;
    }
    if (thread_index() % kWarp == kWarp - 1) s.warp[thread_index() / kWarp] = sum;
    if (thread_index() == 0) s.picked = -1;
    sync();
    for (int w = 0; w < thread_index() / kWarp; ++w) sum += s.warp[w];
    if (sum >= *want && sum - own < *want) s.picked = thread_index(), s.before = sum - own;
    sync();
    if (s.picked < 0) return false;
    *want -= s.before;
    return true;
  }

  // The first index, in order, whose running sum of kept weights exceeds the share `bits` / 2^64 of all of them.
  template <class Kept>
  DEVICE static int64_t draw(const Row& row, Shared& s, uint64_t bits, Kept kept) {
    int64_t first = 0, n = row.n;
    uint64_t left = 0;
    for (bool whole = true; whole || n > 1; whole = false) {
      const int64_t piece = (n + kWarps - 1) / kWarps, begin = first + piece * (thread_index() / kWarp);
      const int64_t end = begin + piece < first + n ? begin + piece : first + n;
      uint64_t sum = 0;
      for (int64_t i = begin + thread_index() % kWarp; i < end; i += kWarp) sum += kept(row.logit(i));
      for (int mask = kWarp / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
      if (thread_index() % kWarp == 0) s.warp[thread_index() / kWarp] = sum;
      sync();
      if (whole) {
        uint64_t all = 0;
        for (int w = 0; w < kWarps; ++w) all += s.warp[w];
        left = high_product(bits, all);
      }
      int w = 0;
      while (left >= s.warp[w]) left -= s.warp[w++];
      n = n - w * piece < piece ? n - w * piece : piece;
      first += w * piece;
      sync();
    }
    return first;
  }
};

}  // namespace gptcore::gpu
