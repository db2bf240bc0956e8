// How a call is cut into blocks of threads: plain C++ that needs no GPU.
// A tile is up to kTile queries that share a row and a key head. Where there are too few tiles for the GPU, every block
// of kBlock keys of a tile becomes a block of threads of its own, and a second kernel merges them in their order; else
// one block of threads walks along the keys, merging as it goes. Both do the same sums in the same order.
#pragma once
#include "../kernels/types.h"

namespace gptcore::gpu {

constexpr int kTile = 8;

struct AttentionArgs {
  Attention a;                   // a.n_block as n_keys says
  int64_t n_keys;                // at least every length + n_new; a row beyond it is not written, and its z is NaN
  int64_t n_tile;                // a row and a key head
  float* partials;               // (B,H,T,n_block,D+2): z, top, sum of each block; null: not split
  bool one;                      // a tile is a single query
  bool wide;                     // keys and values may be read by 16 bytes
};

inline bool aligned(const void* store, const int64_t* stride, int64_t d_head, Dtype dtype) {
  const int64_t n_byte = dtype == Dtype::fp32 ? 4 : 2;
  bool fine = d_head % 8 == 0 && reinterpret_cast<uintptr_t>(store) % 16 == 0;
  for (int i = 0; i < 3; ++i) fine = fine && stride[i] * n_byte % 16 == 0;
  return fine;
}

inline AttentionArgs plan_attention(const Attention& a, int64_t n_keys) {
  AttentionArgs args = {};
  args.a = a, args.n_keys = n_keys;
  args.a.n_block = (n_keys + kBlock - 1) / kBlock;
  const int64_t n_query = a.n_head / a.n_kv_head * a.n_new;
  args.one = n_query == 1, args.n_tile = (n_query + kTile - 1) / kTile;
  args.wide = aligned(a.k_cache, a.k_cache_stride, a.d_head, a.cache_dtype) &&
              aligned(a.v_cache, a.v_cache_stride, a.d_head, a.cache_dtype);
  return args;
}

inline int64_t n_tiles(const AttentionArgs& args) { return args.a.n_row * args.a.n_kv_head * args.n_tile; }

// Floats of workspace for the partial results, or 0 where the keys are better not split: the GPU is busy without.
inline int64_t partial_floats(const AttentionArgs& args, int64_t n_processor) {
  const Attention& a = args.a;
  if (a.n_block < 2 || n_tiles(args) >= 2 * n_processor) return 0;
  return a.n_row * a.n_head * a.n_new * a.n_block * (a.d_head + 2);
}

}  // namespace gptcore::gpu
