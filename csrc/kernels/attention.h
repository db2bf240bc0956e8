// kv_attention_: append T new keys and values to the cache, then z = softmax(scores) v over what each query sees.
// Keys come in blocks of 256 positions. A block gives a query a partial result (top score, sum of e^(score - top), mix of
// values), partial results are merged in the order of blocks (online softmax, arXiv:1805.02867). So a query's bits depend
// on its own row only: not on the batch, the chunking, the threads, or who computed which block. Invisible keys are not
// read: what lies above a length, NaN included, cannot leak. To be included inside an instruction set's region.
//
// A piece of work is up to 32 queries that share a key head: every block of keys and values is fetched once for all of
// them, and four queries at a time share its loads.

constexpr int kQueries = 32;
constexpr int kAhead = 16;     // keys: what one query reads comes from memory, and no machine guesses all of it in time

struct Query {                 // one head of one new token
  float* q;                    // (D), zeros up to a multiple of 16
  float* z;                    // (D) mix of the blocks so far, with top and sum
  float top, sum, slope;
  int64_t position;
  int first, last;             // what it sees of the block at hand, relative to the block
  bool empty;                  // no block yet
};

struct Partial {               // one query, one block
  float *z, *scores;           // (D), (kBlock)
  float top, sum;
};

inline int clamp_to_block(int64_t x) { return int(x < 0 ? 0 : x > kBlock ? kBlock : x); }
inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------------------- append

// Turn the pairs of one head by the angles of one position.  The twin of gptcore/ops.py's rotary.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  const int64_t next = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float *a = x + i * next, *b = a + other;
    const float turned = *a * cos[i] - *b * sin[i];
    *b = *a * sin[i] + *b * cos[i];
    *a = turned;
  }
}

// Row b's new token t is turned where the angles are given.
inline void rotate_new(float* x, const Attention& a, int64_t b, int64_t t) {
  const int64_t at = (b * a.n_new + t) * a.half;
  if (a.cos) rotate(x, a.cos + at, a.sin + at, a.half, a.interleaved);
}

template <class To, class From, class Turn>
inline void append_row(To* to, const From* from, int64_t d, Turn turn) {
  float wide[kMaxHead];
  widen_row(wide, from, d);
  turn(wide);
  for (int64_t i = 0; i < d; ++i) narrow(wide[i], to + i);
}

void append_(const Attention& a, int64_t first, int64_t last) {
  with_type(a.cache_dtype, [&](auto* stored) {
    with_type(a.dtype, [&](auto* fresh) {
      using To = std::remove_reference_t<decltype(*stored)>;
      using From = std::remove_reference_t<decltype(*fresh)>;
      for (int64_t pair = first; pair < last; ++pair) {
        const int64_t b = pair / a.n_kv_head, g = pair % a.n_kv_head;
        for (int64_t t = 0; t < a.n_new; ++t) {
          const int64_t p = a.length[b] + t;
          append_row(static_cast<To*>(a.k_cache) + b * a.k_cache_stride[0] + g * a.k_cache_stride[1] + p * a.k_cache_stride[2],
                     static_cast<const From*>(a.k) + b * a.k_stride[0] + g * a.k_stride[1] + t * a.k_stride[2], a.d_head,
                     [&](float* key) { rotate_new(key, a, b, t); });
          append_row(static_cast<To*>(a.v_cache) + b * a.v_cache_stride[0] + g * a.v_cache_stride[1] + p * a.v_cache_stride[2],
                     static_cast<const From*>(a.v) + b * a.v_stride[0] + g * a.v_stride[1] + t * a.v_stride[2], a.d_head,
                     [](float*) {});
        }
      }
    });
  });
}

// ---------------------------------------------------------------------------------------------- scores, softmax, mix

// scores[r][0..C) = q[r] . k[0..C), every product in order of D: the same bits whatever R and C.
template <int R, int C, class T>
inline void dots(float* const* scores, const float* const* q, const T* k, int64_t stride, int64_t d) {
  F16 sum[R * C], x[R];
  UNROLL
  for (int i = 0; i < R * C; ++i) sum[i] = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    UNROLL
    for (int r = 0; r < R; ++r) x[r] = load(q[r] + i);
    UNROLL
    for (int c = 0; c < C; ++c) {
      const F16 y = load(k + c * stride + i);
      if (R == 1) __builtin_prefetch(k + (c + kAhead) * stride + i);
      UNROLL
      for (int r = 0; r < R; ++r) sum[r * C + c] = fma(x[r], y, sum[r * C + c]);
    }
  }
  if (i < d) {
    UNROLL
    for (int r = 0; r < R; ++r) x[r] = load(q[r] + i);
    UNROLL
    for (int c = 0; c < C; ++c) {
      const F16 y = load(k + c * stride + i, int(d - i));
      UNROLL
      for (int r = 0; r < R; ++r) sum[r * C + c] = fma(x[r], y, sum[r * C + c]);
    }
  }
  float out[R * C];
  totals<R * C>(sum, out);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) scores[r][c] = out[r * C + c];
}

template <int R, class T>
inline void score(Partial* parts, const Query* queries, const T* k, int64_t stride, int64_t d, int first, int last) {
  constexpr int C = kTile / R > 0 ? kTile / R : 1;
  const float* q[R];
  float* s[R];
  for (int r = 0; r < R; ++r) q[r] = queries[r].q;
  int j = first;
  for (; j + C <= last; j += C) {
    for (int r = 0; r < R; ++r) s[r] = parts[r].scores + j;
    dots<R, C>(s, q, k + j * stride, stride, d);
  }
  for (; j < last; ++j) {
    for (int r = 0; r < R; ++r) s[r] = parts[r].scores + j;
    dots<R, 1>(s, q, k + j * stride, stride, d);
  }
}

// Scores become weights e^(score - top): scale, cap, ALiBi, mask. Lanes of invisible keys hold -inf, then 0.
__attribute__((noinline)) void soften(Partial& part, const Query& query, const Attention& a, int64_t base) {
  alignas(64) static const float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* s = part.scores;
  const int begin = query.first / 16 * 16, end = (query.last + 15) / 16 * 16;
  for (int j = begin; j < end; j += 16) {
    F16 x = load(s + j) * splat(a.scale);
    if (a.softcap != 0) x = splat(a.softcap) * tanh_of(x / splat(a.softcap));
    if (a.slopes) x = x - splat(query.slope) * (splat(float(query.position - base - j)) - load(kCount));
    store(s + j, x);
  }
  for (int j = begin; j < query.first; ++j) s[j] = -INFINITY;
  for (int j = query.last; j < end; ++j) s[j] = -INFINITY;
  F16 most = load(s + begin), sum = splat(0.0f);
  for (int j = begin + 16; j < end; j += 16) most = larger(most, load(s + j));
  part.top = top(most);
  for (int j = begin; j < end; j += 16) {
    const F16 w = exp_below(load(s + j) - splat(part.top));
    store(s + j, w);
    sum = sum + w;  // a lane is a position modulo 16
  }
  part.sum = total(sum);
}

// z[r][0..16 W) += sum over j of weight[r][j] v[j], in order of j; only the first n of each sixteen if W is 1.
template <int R, int W, class T>
inline void mix(float* const* z, const float* const* w, const T* v, int64_t stride, int first, int last, int n = 16) {
  F16 sum[R * W];
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int i = 0; i < W; ++i) sum[r * W + i] = load(z[r] + 16 * i);
  }
  for (int j = first; j < last; ++j) {
    F16 y[W];
    UNROLL
    for (int i = 0; i < W; ++i) {
      y[i] = W == 1 && n < 16 ? load(v + j * stride, n) : load(v + j * stride + 16 * i);
      if (R == 1) __builtin_prefetch(v + (j + kAhead) * stride + 16 * i);
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 x = splat(w[r][j]);
      UNROLL
      for (int i = 0; i < W; ++i) sum[r * W + i] = fma(x, y[i], sum[r * W + i]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int i = 0; i < W; ++i) store(z[r] + 16 * i, sum[r * W + i]);
  }
}

template <int R, class T>
inline void mix_all(Partial* parts, const T* v, int64_t stride, int64_t d, int first, int last) {
  constexpr int W = R == 1 ? kWide : kWide / 2;
  float* z[R];
  const float* w[R];
  for (int r = 0; r < R; ++r) w[r] = parts[r].scores;
  int64_t i = 0;
  const auto at = [&](int64_t offset) {
    for (int r = 0; r < R; ++r) z[r] = parts[r].z + offset;
  };
  for (; i + 16 * W <= d; i += 16 * W) at(i), mix<R, W>(z, w, v + i, stride, first, last);
  for (; i + 16 <= d; i += 16) at(i), mix<R, 1>(z, w, v + i, stride, first, last);
  if (i < d) at(i), mix<R, 1>(z, w, v + i, stride, first, last, int(d - i));
}

// One block for up to four queries. Where all see a key they share its load; a query's own edges are walked alone, so
// that nothing invisible is ever multiplied, not even by 0.
template <class T>
__attribute__((noinline)) void attend_block(Partial* parts, const Query* queries, int n, const T* k, const T* v, const Attention& a, int64_t base) {
  const int64_t d = a.d_head, k_stride = a.k_cache_stride[2], v_stride = a.v_cache_stride[2];
  int first = 0, last = int(kBlock);
  for (int r = 0; r < n; ++r) {
    first = first < queries[r].first ? queries[r].first : first;
    last = last < queries[r].last ? last : queries[r].last;
    for (int64_t i = 0; i < padded(d); ++i) parts[r].z[i] = 0.0f;
  }
  const bool shared = n == 4 && first < last;
  if (shared) score<4>(parts, queries, k, k_stride, d, first, last);
  for (int r = 0; r < n; ++r) {
    const Query& query = queries[r];
    if (query.first >= query.last) continue;
    score<1>(parts + r, queries + r, k, k_stride, d, query.first, shared ? first : query.last);
    if (shared) score<1>(parts + r, queries + r, k, k_stride, d, last, query.last);
    soften(parts[r], query, a, base);
    mix_all<1>(parts + r, v, v_stride, d, query.first, shared ? first : query.last);
  }
  if (!shared) return;
  mix_all<4>(parts, v, v_stride, d, first, last);
  for (int r = 0; r < n; ++r) mix_all<1>(parts + r, v, v_stride, d, last, queries[r].last);
}

__attribute__((noinline)) void merge(Query& query, const Partial& part, int64_t d) {
  if (query.empty) {
    for (int64_t i = 0; i < padded(d); ++i) query.z[i] = part.z[i];
    query.top = part.top, query.sum = part.sum, query.empty = false;
    return;
  }
  const float most = query.top > part.top ? query.top : part.top;
  const F16 old = exp_below(splat(query.top - most)), fresh = exp_below(splat(part.top - most));
  for (int64_t i = 0; i < padded(d); i += 16)
    store(query.z + i, fma(fresh, load(part.z + i), old * load(query.z + i)));
  float sum[16];
  store(sum, fma(fresh, splat(part.sum), old * splat(query.sum)));
  query.sum = sum[0], query.top = most;
}

// ------------------------------------------------------------------------------------------------------------- pieces

struct Piece {                 // up to 32 queries of one row and one key head, and their memory
  Query queries[kQueries];
  Partial parts[4];
  int n;
  int64_t row, group, begin;   // query number r of the group is head r % G of token r / G
};

inline int64_t n_queries(const Attention& a) { return a.n_head / a.n_kv_head * a.n_new; }
inline int64_t n_pieces(const Attention& a) { return (n_queries(a) + kQueries - 1) / kQueries; }
int64_t attend_units(const Attention& a) { return a.n_row * a.n_kv_head * n_pieces(a); }

__attribute__((noinline)) void start(Piece& piece, const Attention& a, int64_t index, float* memory) {
  const int64_t d = padded(a.d_head), per_head = a.n_head / a.n_kv_head;
  piece.row = index / n_pieces(a) / a.n_kv_head, piece.group = index / n_pieces(a) % a.n_kv_head;
  piece.begin = index % n_pieces(a) * kQueries;
  piece.n = int(smaller(kQueries, n_queries(a) - piece.begin));
  for (int r = 0; r < 4; ++r, memory += d + kBlock) piece.parts[r] = {memory, memory + d, 0.0f, 0.0f};
  for (int r = 0; r < piece.n; ++r, memory += 2 * d) {
    const int64_t t = (piece.begin + r) / per_head, h = piece.group * per_head + (piece.begin + r) % per_head;
    piece.queries[r] = {memory, memory + d, 0.0f, 0.0f, a.slopes ? a.slopes[h] : 0.0f, a.length[piece.row] + t, 0, 0, true};
    with_type(a.dtype, [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      widen_row(memory, static_cast<const T*>(a.q) + piece.row * a.q_stride[0] + h * a.q_stride[1] + t * a.q_stride[2], a.d_head);
    });
    rotate_new(piece.queries[r].q, a, piece.row, t);
  }
}

inline size_t piece_floats(const Attention& a) { return 4 * (padded(a.d_head) + kBlock) + kQueries * 2 * padded(a.d_head); }

inline void look_at(Query& query, const Attention& a, int64_t base) {
  query.last = clamp_to_block(query.position + 1 - base);
  query.first = a.window ? clamp_to_block(query.position + 1 - a.window - base) : 0;
}

// done(r, part) for every query r of the piece that sees something of the block.
template <class T, class Done>
inline void over_block(Piece& piece, const Attention& a, int64_t block, Done done) {
  const int64_t base = block * kBlock;
  const T* k = static_cast<const T*>(a.k_cache) + piece.row * a.k_cache_stride[0] + piece.group * a.k_cache_stride[1];
  const T* v = static_cast<const T*>(a.v_cache) + piece.row * a.v_cache_stride[0] + piece.group * a.v_cache_stride[1];
  for (int r = 0; r < piece.n; r += 4) {
    const int n = int(smaller(4, piece.n - r));
    bool any = false;
    for (int i = 0; i < n; ++i) {
      Query& query = piece.queries[r + i];
      look_at(query, a, base);
      any = any || query.first < query.last;
    }
    if (!any) continue;
    attend_block(piece.parts, piece.queries + r, n, k + base * a.k_cache_stride[2], v + base * a.v_cache_stride[2], a, base);
    for (int i = 0; i < n; ++i)
      if (piece.queries[r + i].first < piece.queries[r + i].last) done(r + i, piece.parts[i]);
  }
}

__attribute__((noinline)) void finish(Piece& piece, const Attention& a) {
  const int64_t per_head = a.n_head / a.n_kv_head;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int r = 0; r < piece.n; ++r) {
      const Query& query = piece.queries[r];
      const int64_t t = (piece.begin + r) / per_head, h = piece.group * per_head + (piece.begin + r) % per_head;
      T* z = static_cast<T*>(a.z) + ((piece.row * a.n_head + h) * a.n_new + t) * a.d_head;
      for (int64_t i = 0; i < a.d_head; ++i) narrow(query.z[i] / query.sum, z + i);
    }
  });
}

void attend(const Attention& a, int64_t first, int64_t last) {
  float* memory = static_cast<float*>(scratch(piece_floats(a) * sizeof(float)));
  with_type(a.cache_dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t index = first; index < last; ++index) {
      Piece piece;
      start(piece, a, index, memory);
      const auto merge_it = [&](int r, const Partial& part) { merge(piece.queries[r], part, a.d_head); };
      for (int64_t block = 0; block < a.n_block; ++block) over_block<T>(piece, a, block, merge_it);
      finish(piece, a);
    }
  });
}

// --------------------------------------------------------------------- the same, when there are fewer pieces than threads

inline int64_t partial_floats(const Attention& a) { return padded(a.d_head) + 16; }  // z, then top and sum
inline float* partial_of(const Attention& a, void* partials, int64_t index, int r) {
  return static_cast<float*>(partials) + (index * smaller(kQueries, n_queries(a)) + r) * partial_floats(a);
}

size_t partial_bytes(const Attention& a) {
  return size_t(attend_units(a) * a.n_block * smaller(kQueries, n_queries(a)) * partial_floats(a)) * sizeof(float);
}

void attend_partial(const Attention& a, void* partials, int64_t first, int64_t last) {
  float* memory = static_cast<float*>(scratch(piece_floats(a) * sizeof(float)));
  with_type(a.cache_dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t index = first; index < last; ++index) {
      Piece piece;
      start(piece, a, index / a.n_block, memory);
      over_block<T>(piece, a, index % a.n_block, [&](int r, const Partial& part) {
        float* kept = partial_of(a, partials, index, r);
        for (int64_t i = 0; i < padded(a.d_head); ++i) kept[i] = part.z[i];
        kept[padded(a.d_head)] = part.top, kept[padded(a.d_head) + 1] = part.sum;
      });
    }
  });
}

void attend_merge(const Attention& a, const void* partials, int64_t first, int64_t last) {
  float* memory = static_cast<float*>(scratch(piece_floats(a) * sizeof(float)));
  for (int64_t index = first; index < last; ++index) {
    Piece piece;
    start(piece, a, index, memory);
    for (int64_t block = 0; block < a.n_block; ++block) {
      for (int r = 0; r < piece.n; ++r) {
        look_at(piece.queries[r], a, block * kBlock);
        if (piece.queries[r].first >= piece.queries[r].last) continue;
        float* kept = partial_of(a, const_cast<void*>(partials), index * a.n_block + block, r);
        merge(piece.queries[r], {kept, nullptr, kept[padded(a.d_head)], kept[padded(a.d_head) + 1]}, a.d_head);
      }
    }
    finish(piece, a);
  }
}
