// sample: one token a row, by whole numbers, so that every machine draws the same.  The twin of gptcore/sampling.py.
// A logit's weight is floor(e^((z - best) / temperature) 2^40); integer sums do not depend on their order; 64 bits of
// Philox choose. Multiplications and additions of the weight must stay apart: a fused one changes hundreds of weights.
// To be included inside an instruction set's region.
//
// No sort. top-k: at least k logits reach the k-th largest of the maxima of 64 neighbours, and few more do, so the rest
// is never looked at again. top-p: a histogram of mass finds the interval where the share is reached, and quickselect
// the logit in it.

constexpr int64_t kNeighbours = 64;
constexpr int kBins = 1024;
constexpr int64_t kOne = int64_t(1) << 40;  // the weight of a most likely token

inline F16 exp_weight(F16 x) {  // e^x 2^40 for x <= 0, not yet floored; kept word for word as in sampling.py
  x = larger(splat(-100.0f), x);
  const F16 t = x * splat(float(1.44269504)) + splat(kRound), n = t - splat(kRound);
  const F16 r = (x - n * splat(float(0.693359375))) + n * splat(float(2.12194440e-4));
  F16 p = splat(float(1.9875691500e-4));
  for (double c : {1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1})
    p = p * r + splat(float(c));
  p = times_2n((p * (r * r) + r) + splat(1.0f), t);
  return where_less(splat(-80.0f), x, p, splat(0.0f)) * splat(float(kOne));
}

inline void weigh(int64_t* w, const float* z, int64_t n, float best, float inverse) {
  alignas(64) float wide[16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    store(wide, exp_weight((load(z + i) - splat(best)) * splat(inverse)));
    for (int l = 0; l < 16; ++l) w[i + l] = int64_t(wide[l]);
  }
  if (i == n) return;
  store(wide, exp_weight((load(z + i, int(n - i)) - splat(best)) * splat(inverse)));
  for (int l = 0; i < n; ++i, ++l) w[i] = int64_t(wide[l]);
}

// The largest logit of every 64 neighbours; false where there is NaN, +inf, or nothing above -inf.
inline bool maxima(float* most, float* best, const float* z, int64_t n) {
  F16 worst = splat(0.0f);
  *best = -INFINITY;
  for (int64_t i = 0; i < n; i += kNeighbours) {
    float here = -INFINITY;
    if (i + kNeighbours <= n) {
      F16 x = load(z + i);
      worst = larger(worst, where_less(x, splat(INFINITY), splat(0.0f), splat(1.0f)));
      for (int l = 16; l < kNeighbours; l += 16) {
        const F16 y = load(z + i + l);
        worst = larger(worst, where_less(y, splat(INFINITY), splat(0.0f), splat(1.0f)));
        x = larger(x, y);
      }
      here = top(x);
    } else {
      for (int64_t j = i; j < n; ++j) {
        if (!(z[j] < INFINITY)) return false;
        here = z[j] > here ? z[j] : here;
      }
    }
    *most++ = here;
    *best = here > *best ? here : *best;
  }
  return top(worst) == 0 && *best > -INFINITY;
}

// The largest z such that the weights from it on up reach want, or -inf; z and w are permuted. Quickselect by mass.
inline float reach(float* z, int64_t* w, int64_t n, int64_t want) {
  for (int64_t first = 0, last = n; first < last;) {
    const float x = z[first], y = z[(first + last) / 2], u = z[last - 1];
    const float pivot = x < y ? (y < u ? y : x < u ? u : x) : (x < u ? x : y < u ? u : y);
    int64_t above = first, below = last, more = 0, equal = 0;
    for (int64_t i = first; i < below;) {
      if (z[i] > pivot) {
        more += w[i];
        std::swap(z[i], z[above]), std::swap(w[i++], w[above++]);
      } else if (z[i] < pivot) {
        --below;
        std::swap(z[i], z[below]), std::swap(w[i], w[below]);
      } else {
        equal += w[i++];
      }
    }
    if (more >= want) {
      last = above;
    } else if (more + equal >= want) {
      return pivot;
    } else {
      want -= more + equal;
      first = below;
    }
  }
  return -INFINITY;
}

// As reach, over many logits, which stay as they are: only those in the interval where the share is reached are copied.
inline float reach_among(const float* z, const int64_t* w, int64_t n, int64_t want, float best, float inverse, uint16_t* bins,
                         float* some_z, int64_t* some_w) {
  constexpr float kScale = kBins / 28.0f;  // 28 below the best a weight is 0
  int64_t mass[4][kBins] = {};             // four, because an addition to a sum just written must wait for it
  for (int64_t i = 0; i < n; ++i) {
    const float x = (best - z[i]) * inverse * kScale;
    bins[i] = uint16_t(x < kBins - 1 ? x : kBins - 1);
  }
  for (int64_t i = 0; i < n; ++i) mass[i % 4][bins[i]] += w[i];
  for (int bin = 0; bin < kBins; ++bin) {
    const int64_t here = mass[0][bin] + mass[1][bin] + mass[2][bin] + mass[3][bin];
    if (here < want) {
      want -= here;
      continue;
    }
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {  // without a branch: whether a logit falls into the bin cannot be foreseen
      some_z[m] = z[i], some_w[m] = w[i];
      m += bins[i] == bin;
    }
    return reach(some_z, some_w, m, want);
  }
  return -INFINITY;
}

// 64 random bits from a seed and a position.  Philox4x32-10, Salmon et al. 2011.
inline uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32), x0 = uint32_t(position), x1 = uint32_t(position >> 32), x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(x0) * 0xD2511F53u, b = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(b >> 32) ^ x1 ^ k0, x1 = uint32_t(b), x2 = uint32_t(a >> 32) ^ x3 ^ k1, x3 = uint32_t(a);
  }
  return uint64_t(x1) << 32 | x0;
}

// The first index, in order, whose running sum of kept weights exceeds the share `bits` / 2^64 of all of them.
inline int64_t draw(const float* z, const int64_t* w, int64_t n, float edge, int64_t least, uint64_t bits, int64_t* sums) {
  constexpr int64_t kRun = 1024;
  int64_t all = 0, n_run = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    int64_t sum = 0;
    const int64_t end = smaller(i + kRun, n);
    for (int64_t j = i; j < end; ++j) sum += (z[j] >= edge) & (w[j] >= least) ? w[j] : 0;
    all += sums[n_run++] = sum;
  }
  int64_t left = int64_t((unsigned __int128)(bits) * (unsigned __int128)(all) >> 64), run = 0;
  while (left >= sums[run]) left -= sums[run++];
  for (int64_t i = run * kRun;; ++i) {
    const int64_t kept = z[i] >= edge && w[i] >= least ? w[i] : 0;
    if (left < kept) return i;
    left -= kept;
  }
}

template <class T>
inline int64_t sample_row(const Sampling& s, int64_t row) {
  const int64_t n = s.n_vocab, room = (n + 127) / 64 * 64;
  int64_t* w = static_cast<int64_t*>(scratch(size_t(room) * 40));
  int64_t *some_w = w + room, *sums = some_w + room;
  float *wide = reinterpret_cast<float*>(sums + room), *some_z = wide + room, *most = some_z + room;
  uint16_t* bins = reinterpret_cast<uint16_t*>(most + room / 2);
  const T* logits = static_cast<const T*>(s.logits) + row * s.logits_stride;
  const float* z;
  if constexpr (std::is_same_v<T, float>) {
    z = logits;
  } else {
    widen_row(wide, logits, n);
    z = wide;
  }
  float best;
  if (!maxima(most, &best, z, n)) return -1;
  const float inverse = s.temperature_inverse;
  if (inverse == 0) {
    int64_t i = 0;
    while (most[i / kNeighbours] != best) i += kNeighbours;
    while (z[i] != best) ++i;
    return i;
  }
  int64_t n_left = n;
  int32_t* ids = nullptr;
  if (s.top_k > 0 && s.top_k < n) {
    ids = reinterpret_cast<int32_t*>(sums);
    const int64_t n_most = (n + kNeighbours - 1) / kNeighbours;
    float floor = -INFINITY;
    if (s.top_k <= n_most) {
      for (int64_t i = 0; i < n_most; ++i) some_z[i] = most[i];
      std::nth_element(some_z, some_z + s.top_k - 1, some_z + n_most, std::greater<float>());
      floor = some_z[s.top_k - 1];
    }
    n_left = 0;
    for (int64_t i = 0; i < n_most; ++i) {
      if (most[i] < floor) continue;
      for (int64_t j = i * kNeighbours; j < smaller((i + 1) * kNeighbours, n); ++j) {
        ids[n_left] = int32_t(j);
        n_left += z[j] >= floor;
      }
    }
    for (int64_t i = 0; i < n_left; ++i) some_z[i] = z[ids[i]];
    std::nth_element(some_z, some_z + s.top_k - 1, some_z + n_left, std::greater<float>());
    const float edge = some_z[s.top_k - 1];
    int64_t m = 0;
    for (int64_t i = 0; i < n_left; ++i) {  // ties at the edge are all kept
      const int32_t id = ids[i];
      if (z[id] < edge) continue;
      ids[m] = id;
      some_z[m++] = z[id];
    }
    n_left = m;
    for (int64_t i = 0; i < n_left; ++i) wide[i] = some_z[i];  // z is no longer needed, or lies elsewhere
    z = wide;
    sums = some_w + room + room / 2;  // beyond ids
  }
  weigh(w, z, n_left, best, inverse);
  float edge = -INFINITY;
  if (s.top_p < 1) {
    int64_t all = 0;
    for (int64_t i = 0; i < n_left; ++i) all += w[i];
    const double share = std::floor(double(all) * s.top_p);
    const int64_t want = share < 1 ? 1 : int64_t(share);
    if (n_left > 2048) {
      edge = reach_among(z, w, n_left, want, best, inverse, bins, some_z, some_w);
    } else {
      for (int64_t i = 0; i < n_left; ++i) some_z[i] = z[i], some_w[i] = w[i];
      edge = reach(some_z, some_w, n_left, want);
    }
  }
  const int64_t least = int64_t(std::ceil(s.min_p * double(kOne)));
  const uint64_t bits = philox(uint64_t(s.seed[row * s.seed_stride]), uint64_t(s.position[row * s.position_stride]));
  const int64_t drawn = draw(z, w, n_left, edge, least, bits, sums);
  return ids ? ids[drawn] : drawn;
}

void sample(const Sampling& s, int64_t first, int64_t last) {
  with_type(s.dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t row = first; row < last; ++row) s.tokens[row] = sample_row<T>(s, row);
  });
}
