// kv_attention_ for a GPU: append T new keys and values to the cache, then z = softmax(scores) v over what is visible.
// Keys come in blocks of 256 positions; a block gives a query its top score, its sum of e^(score - top) and its mix of
// values, and blocks are merged in their order (online softmax, arXiv:1805.02867; splitting keys for decoding: Dao et
// al. 2023, "Flash-Decoding"). So a query's bits depend on its own row only: not on the batch, the chunking, n_keys,
// whether the keys are split, or the warp. Invisible keys are never multiplied, not even by 0: NaN there cannot leak.
//
// A block of threads has 16 groups of eight lanes. A group takes every 16th key; a lane eight neighbouring numbers of
// D, then the next eight that are 64 further on. Four keys at a time are on their way from memory.
#pragma once
#include "numbers.h"
#include "plan.h"

namespace gptcore::gpu {

constexpr int kLanes = 8, kGroups = 16, kTeams = 4;  // a team is 32 threads: groups meet there by shuffling
constexpr int kColumns = 8 * kLanes;                 // of D, that the lanes of a group cover at once
constexpr int kFlight = 4;                           // keys of a group on their way
constexpr int kStride = kFlight * kGroups;           // keys that the groups take at once

// What the queries [begin, end) of row b and key head g are; query r is head r % G of new token r / G.
struct Tile {
  int64_t b, g, begin, per_head, length, from, to;   // keys [from, to) are visible to one query or another
  int n;
};

DEVICE bool fits(const AttentionArgs& args, int64_t b) {
  return args.a.length[b] >= 0 && args.a.length[b] <= args.n_keys - args.a.n_new;
}

DEVICE Tile tile_at(const AttentionArgs& args, int64_t index) {
  const Attention& a = args.a;
  Tile t;
  const int64_t pair = index / args.n_tile;
  t.b = pair / a.n_kv_head, t.g = pair % a.n_kv_head, t.per_head = a.n_head / a.n_kv_head;
  t.begin = index % args.n_tile * kTile;
  const int64_t left = t.per_head * a.n_new - t.begin;
  t.n = int(left < kTile ? left : kTile), t.length = a.length[t.b];
  const int64_t oldest = t.length + t.begin / t.per_head, newest = t.length + (t.begin + t.n - 1) / t.per_head;
  t.to = newest + 1;
  t.from = a.window && oldest + 1 > a.window ? oldest + 1 - a.window : 0;
  return t;
}

DEVICE int64_t head_of(const Tile& t, int r) { return t.g * t.per_head + (t.begin + r) % t.per_head; }
DEVICE int64_t token_of(const Tile& t, int r) { return (t.begin + r) / t.per_head; }
DEVICE int64_t position_of(const Tile& t, int r) { return t.length + token_of(t, r); }
DEVICE bool sees(const Attention& a, int64_t position, int64_t key) {
  return key <= position && (a.window == 0 || key > position - a.window);
}
DEVICE bool sees_some(const Attention& a, int64_t position, int64_t base) {
  return base <= position && (a.window == 0 || base + kBlock - 1 > position - a.window);
}
DEVICE int64_t offset_of(const int64_t* stride, int64_t b, int64_t head, int64_t position) {
  return b * stride[0] + head * stride[1] + position * stride[2];
}
DEVICE float* partial_of(const AttentionArgs& args, int64_t b, int64_t head, int64_t token, int64_t block) {
  const Attention& a = args.a;
  return args.partials + (((b * a.n_head + head) * a.n_new + token) * a.n_block + block) * (a.d_head + 2);
}

// Number d of a head of q or k for new token t, turned by the token's angle where angles are given. The twin of
// gptcore/ops.py's rotary, each product and sum rounded apart, as there.
DEVICE float turned(const Attention& a, const void* from, int64_t offset, int64_t b, int64_t t, int64_t d) {
  const float x = load_any(from, a.dtype, offset + d);
  if (!a.cos || d >= 2 * a.half) return x;
  const bool second = a.interleaved ? d % 2 : d >= a.half;
  const int64_t angle = (b * a.n_new + t) * a.half + (a.interleaved ? d / 2 : d % a.half);
  const int64_t step = a.interleaved ? 1 : a.half;
  const float other = load_any(from, a.dtype, offset + (second ? d - step : d + step));
  const float along = times(x, a.cos[angle]), across = times(other, a.sin[angle]);
  return second ? plus(across, along) : plus(along, -across);
}

// The new tokens at positions [from, to) into the cache, by the threads of one block.
template <class T>
DEVICE void append(const AttentionArgs& args, int64_t b, int64_t g, int64_t from, int64_t to, int n_thread) {
  const Attention& a = args.a;
  const int64_t length = a.length[b];
  from = from < length ? length : from, to = to < length + a.n_new ? to : length + a.n_new;
  for (int64_t i = thread_index(); i < (to - from) * a.d_head; i += n_thread) {
    const int64_t p = from + i / a.d_head, d = i % a.d_head;
    narrow(turned(a, a.k, offset_of(a.k_stride, b, g, p - length), b, p - length, d),
           static_cast<T*>(a.k_cache) + offset_of(a.k_cache_stride, b, g, p) + d);
    narrow(load_any(a.v, a.dtype, offset_of(a.v_stride, b, g, p - length) + d),
           static_cast<T*>(a.v_cache) + offset_of(a.v_cache_stride, b, g, p) + d);
  }
}

// Merging two results: what each is to be multiplied by, and the top of both.
struct Merge {
  float old, fresh, top;
};
DEVICE Merge merge(float old_top, float fresh_top) {
  const float top = larger(old_top, fresh_top);
  return {exp_below(old_top - top), exp_below(fresh_top - top), top};
}

// ------------------------------------------------------------------------------------------------------------ append

// Only where several tiles share their keys: a single tile appends its own. A block of threads a row and key head.
template <class T>
struct Append {
  static constexpr int kThreads = 256;
  struct Shared {};

  DEVICE static void body(const AttentionArgs& args, Shared&) {
    const int64_t b = block_index() / args.a.n_kv_head, g = block_index() % args.a.n_kv_head;
    if (fits(args, b)) append<T>(args, b, g, 0, args.n_keys, kThreads);
  }
};

// ------------------------------------------------------------------------------------------------------------ attend

template <class T, int Q>
struct Attend {
  static constexpr int kThreads = kGroups * kLanes;

  struct Shared {
    float q[Q][kMaxHead];                            // zeros beyond D and beyond the tile
    float z[Q][kMaxHead];                            // the mix of the blocks so far, with top and sum
    float top[Q], sum[Q], slope[Q];
    int64_t position[Q];
    int first, last;                                 // keys of the block at hand that are looked at: whole strides
    float weight[Q][kBlock];                         // scores, then e^(score - top); -1: invisible
    float part[kTeams][Q][kColumns];                 // a team's mix of the block at hand
    float part_top[kTeams][Q], part_sum[kTeams][Q];
  };

  DEVICE static void body(const AttentionArgs& args, Shared& s) {
    const Attention& a = args.a;
    const bool split = args.partials;
    const int64_t n_block = split ? a.n_block : 1, first = split ? block_index() % n_block : 0;
    const Tile t = tile_at(args, block_index() / n_block);
    if (!fits(args, t.b)) {
      for (int i = thread_index(); !split && i < t.n * a.d_head; i += kThreads)
        store_z(a, t, i / int(a.d_head), i % int(a.d_head), kInfinity - kInfinity);
      return;
    }
    const int64_t last = split ? first + 1 : a.n_block;
    if (first * kBlock >= t.to || last * kBlock <= t.from) return;
    if (args.n_tile == 1) append<T>(args, t.b, t.g, first * kBlock, last * kBlock, kThreads);
    for (int i = thread_index(); i < Q * kMaxHead; i += kThreads) {
      const int r = i / kMaxHead, d = i % kMaxHead;
      s.q[r][d] = 0.0f;
      if (r < t.n && d < a.d_head)
        s.q[r][d] = turned(a, a.q, offset_of(a.q_stride, t.b, head_of(t, r), token_of(t, r)), t.b, token_of(t, r), d);
    }
    if (const int r = thread_index(); r < Q) {
      s.sum[r] = 0.0f, s.position[r] = position_of(t, r);
      s.slope[r] = a.slopes && r < t.n ? a.slopes[head_of(t, r)] : 0.0f;
    }
    sync();
    for (int64_t block = first; block < last; ++block) {
      const int64_t base = block * kBlock;
      if (base >= t.to) break;
      if (base + kBlock <= t.from) continue;
      if (thread_index() == 0) {
        s.first = t.from > base ? int(t.from - base) / kStride * kStride : 0;
        s.last = t.to - base < kBlock ? (int(t.to - base) + kStride - 1) / kStride * kStride : int(kBlock);
      }
      sync();
      score(args, t, base, s);
      weigh(a, t.n, base, s);
      for (int d = 0; d < a.d_head; d += kColumns) {
        mix(args, t, base, d, s);
        sync();
        for (int i = thread_index(); i < t.n * kColumns; i += kThreads)
          take(args, t, block, i / kColumns, d + i % kColumns, d, s);
        sync();
      }
      if (thread_index() < t.n) settle(args, t, block, thread_index(), s);
      sync();
    }
    for (int i = thread_index(); !split && i < t.n * a.d_head; i += kThreads) {
      const int r = i / int(a.d_head), d = i % int(a.d_head);
      store_z(a, t, r, d, s.z[r][d] / s.sum[r]);
    }
  }

 private:
  DEVICE static int lane() { return thread_index() % kLanes; }
  DEVICE static int group() { return thread_index() / kLanes; }
  DEVICE static int team() { return thread_index() / 32; }
  DEVICE static bool speaks_for_team() { return thread_index() % 32 < kLanes; }

  // Scores of the block for every query, capped and biased, -inf where invisible; and the top of each team.
  DEVICE static void score(const AttentionArgs& args, const Tile& t, int64_t base, Shared& s) {
    const Attention& a = args.a;
    const T* k = static_cast<const T*>(a.k_cache) + offset_of(a.k_cache_stride, t.b, t.g, base);
    float top[Q];
    UNROLL
    for (int r = 0; r < Q; ++r) top[r] = -kInfinity;
    for (int j = s.first + group(); j < s.last; j += kStride) {
      float dot[kFlight][Q] = {};
      for (int d = 8 * lane(); d < a.d_head; d += kColumns) {
        float x[kFlight][8];
        UNROLL
        for (int c = 0; c < kFlight; ++c) load_key(x[c], k, a.k_cache_stride[2], args, t, base, j + c * kGroups, d);
        UNROLL
        for (int r = 0; r < Q; ++r) {
          UNROLL
          for (int c = 0; c < kFlight; ++c) {
            UNROLL
            for (int i = 0; i < 8; ++i) dot[c][r] = fused(x[c][i], s.q[r][d + i], dot[c][r]);
          }
        }
      }
      UNROLL
      for (int r = 0; r < Q; ++r) {
        UNROLL
        for (int c = 0; c < kFlight; ++c) {
          const int64_t key = base + j + c * kGroups;
          float x = dot[c][r];
          UNROLL
          for (int mask = kLanes / 2; mask; mask /= 2) x = plus(x, shuffle_xor(x, mask));
          x = times(x, a.scale);
          if (a.softcap != 0) x = times(a.softcap, tanh_of(x / a.softcap));
          if (a.slopes) x = plus(x, -times(s.slope[r], float(s.position[r] - key)));
          if (r >= t.n || !sees(a, s.position[r], key)) x = -kInfinity;
          if (lane() == 0) s.weight[r][j + c * kGroups] = x;
          top[r] = larger(x, top[r]);
        }
      }
    }
    UNROLL
    for (int r = 0; r < Q; ++r) {
      top[r] = larger(top[r], shuffle_xor(top[r], kLanes));
      top[r] = larger(top[r], shuffle_xor(top[r], 2 * kLanes));
      if (speaks_for_team()) s.part_top[team()][r] = top[r];
    }
    sync();
  }

  DEVICE static float block_top(int r, const Shared& s) {
    return larger(larger(s.part_top[0][r], s.part_top[1][r]), larger(s.part_top[2][r], s.part_top[3][r]));
  }

  DEVICE static void weigh(const Attention& a, int n, int64_t base, Shared& s) {
    for (int i = thread_index(); i < n * int(kBlock); i += kThreads) {
      const int r = i / int(kBlock), j = i % int(kBlock);
      if (j < s.first || j >= s.last) continue;
      const bool visible = sees(a, s.position[r], base + j);
      s.weight[r][j] = visible ? exp_below(s.weight[r][j] - block_top(r, s)) : -1.0f;
    }
    sync();
  }

  // The teams' mixes of 64 columns of the values from d0 on, and with the first columns the sums of the weights.
  DEVICE static void mix(const AttentionArgs& args, const Tile& t, int64_t base, int d0, Shared& s) {
    const Attention& a = args.a;
    const T* v = static_cast<const T*>(a.v_cache) + offset_of(a.v_cache_stride, t.b, t.g, base);
    const int d = d0 + 8 * lane();
    float z[Q][8] = {}, sum[Q] = {};
    for (int j = s.first + group(); j < s.last; j += kStride) {
      float x[kFlight][8];
      UNROLL
      for (int c = 0; c < kFlight; ++c) load_key(x[c], v, a.v_cache_stride[2], args, t, base, j + c * kGroups, d);
      UNROLL
      for (int c = 0; c < kFlight; ++c) {
        UNROLL
        for (int r = 0; r < Q; ++r) {
          const float w = r < t.n ? s.weight[r][j + c * kGroups] : -1.0f;
          if (w < 0) continue;
          sum[r] = plus(sum[r], w);
          UNROLL
          for (int i = 0; i < 8; ++i) z[r][i] = fused(w, x[c][i], z[r][i]);
        }
      }
    }
    UNROLL
    for (int r = 0; r < Q; ++r) {
      UNROLL
      for (int i = 0; i < 8; ++i) {
        z[r][i] = plus(z[r][i], shuffle_xor(z[r][i], kLanes));
        z[r][i] = plus(z[r][i], shuffle_xor(z[r][i], 2 * kLanes));
        if (speaks_for_team()) s.part[team()][r][8 * lane() + i] = z[r][i];
      }
      sum[r] = plus(sum[r], shuffle_xor(sum[r], kLanes));
      sum[r] = plus(sum[r], shuffle_xor(sum[r], 2 * kLanes));
      if (speaks_for_team() && lane() == 0) s.part_sum[team()][r] = sum[r];
    }
  }

  // Eight numbers of key j of the block, zeros where no query of the tile sees it or D has ended.
  DEVICE static void load_key(float* x, const T* store, int64_t stride, const AttentionArgs& args, const Tile& t, int64_t base,
                              int j, int d) {
    if (base + j >= t.from && base + j < t.to && d < args.a.d_head) {
      load8(x, store + j * stride + d, args.a.d_head - d, args.wide);
    } else {
      UNROLL
      for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    }
  }

  DEVICE static float total(float a, float b, float c, float d) { return plus(plus(a, b), plus(c, d)); }

  // The block's mix of column d for query r: kept for later, or merged with what came before.
  DEVICE static void take(const AttentionArgs& args, const Tile& t, int64_t block, int r, int d, int d0, Shared& s) {
    if (d >= args.a.d_head || !sees_some(args.a, s.position[r], block * kBlock)) return;
    const int i = d - d0;
    const float fresh = total(s.part[0][r][i], s.part[1][r][i], s.part[2][r][i], s.part[3][r][i]);
    if (args.partials) {
      partial_of(args, t.b, head_of(t, r), token_of(t, r), block)[d] = fresh;
    } else if (s.sum[r] == 0) {  // the first block that it sees
      s.z[r][d] = fresh;
    } else {
      const Merge m = merge(s.top[r], block_top(r, s));
      s.z[r][d] = fused(m.fresh, fresh, times(m.old, s.z[r][d]));
    }
  }

  DEVICE static void settle(const AttentionArgs& args, const Tile& t, int64_t block, int r, Shared& s) {
    if (!sees_some(args.a, s.position[r], block * kBlock)) return;
    const float top = block_top(r, s), sum = total(s.part_sum[0][r], s.part_sum[1][r], s.part_sum[2][r], s.part_sum[3][r]);
    if (args.partials) {
      float* kept = partial_of(args, t.b, head_of(t, r), token_of(t, r), block) + args.a.d_head;
      kept[0] = top, kept[1] = sum;
    } else if (s.sum[r] == 0) {
      s.top[r] = top, s.sum[r] = sum;
    } else {
      const Merge m = merge(s.top[r], top);
      s.top[r] = m.top, s.sum[r] = fused(m.fresh, sum, times(m.old, s.sum[r]));
    }
  }

  DEVICE static void store_z(const Attention& a, const Tile& t, int r, int d, float z) {
    store_any(z, a.z, a.dtype, ((t.b * a.n_head + head_of(t, r)) * a.n_new + token_of(t, r)) * a.d_head + d);
  }
};

// ----------------------------------------------------------------------------------------------------------- combine

// One query a block of threads: the partial results of its blocks of keys, merged in their order.
struct Combine {
  static constexpr int kThreads = 64;
  struct Shared {};

  DEVICE static void body(const AttentionArgs& args, Shared&) {
    const Attention& a = args.a;
    const int64_t token = block_index() % a.n_new, head = block_index() / a.n_new % a.n_head;
    const int64_t b = block_index() / a.n_new / a.n_head, position = a.length[b] + token;
    for (int d = thread_index(); d < a.d_head; d += kThreads) {
      float z = kInfinity - kInfinity, top = 0.0f, sum = 0.0f;
      for (int64_t block = 0; fits(args, b) && block < a.n_block; ++block) {
        if (!sees_some(a, position, block * kBlock)) continue;
        const float* kept = partial_of(args, b, head, token, block);
        if (sum == 0) {
          z = kept[d], top = kept[a.d_head], sum = kept[a.d_head + 1];
        } else {
          const Merge m = merge(top, kept[a.d_head]);
          z = fused(m.fresh, kept[d], times(m.old, z)), top = m.top;
          sum = fused(m.fresh, kept[a.d_head + 1], times(m.old, sum));
        }
      }
      store_any(z / sum, a.z, a.dtype, block_index() * a.d_head + d);
    }
  }
};

}  // namespace gptcore::gpu
