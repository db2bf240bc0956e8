// decode_: whole steps of a GPT, a token a row each, by a team of threads that meets five times a layer.
// From memory a token costs its weights' bytes, so every row of weights is read once, in order, for all rows of the
// batch. Rows of a matrix are shared out, a sum never is: it has one order whatever the batch, the threads, the steps a
// call. Weights may be rounded, activations and sums are floats. The twin of gptcore/model.py's forward for T = 1; to be
// included inside an instruction set's region, after attention.h and sample.h.

// ------------------------------------------------------------------------------------------------------ matrix times x

constexpr int kSums = 4;             // independent sums of sixteen lanes: as many additions are under way at once

// Rounded weights take several loads and conversions a line of the cache. While they wait for it they fill the queues,
// and the machine does not see the next lines; so a line is touched as a whole first. What is asked for ahead goes to
// the second level: the first has too few places for lines under way. benchmarks/bench_decode.py shows what it is worth.
constexpr int kAheadBytes = 8192;

template <class W>
inline void fetch(const W* w) {  // 64 numbers
  UNROLL
  for (int line = 0; line < int(sizeof(W)); ++line) {
    const char* p = reinterpret_cast<const char*>(w) + 64 * line;
    __builtin_prefetch(p + kAheadBytes, 0, 2);
    if (sizeof(W) < sizeof(float)) touch(p);
  }
}

// sums[16 r] = w times x[r], lane by lane, over n numbers, a multiple of 16: number i goes to sum i / 16 % 4, lane i % 16.
template <int R, class W>
inline void row_sums(F16* sums, const W* w, const float* const* x, int64_t n) {
  F16 sum[R * kSums];
  UNROLL
  for (int i = 0; i < R * kSums; ++i) sum[i] = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 * kSums <= n; i += 16 * kSums) {
    fetch(w + i);
    UNROLL
    for (int a = 0; a < kSums; ++a) {
      const F16 y = load(w + i + 16 * a);
      UNROLL
      for (int r = 0; r < R; ++r) sum[r * kSums + a] = fma(y, load(x[r] + i + 16 * a), sum[r * kSums + a]);
    }
  }
  UNROLL
  for (int a = 0; a < kSums - 1; ++a) {
    if (i + 16 * a >= n) break;
    const F16 y = load(w + i + 16 * a);
    UNROLL
    for (int r = 0; r < R; ++r) sum[r * kSums + a] = fma(y, load(x[r] + i + 16 * a), sum[r * kSums + a]);
  }
  UNROLL
  for (int r = 0; r < R; ++r)
    sums[16 * r] = (sum[r * kSums] + sum[r * kSums + 1]) + (sum[r * kSums + 2] + sum[r * kSums + 3]);
}

// Outputs first..last-1 of y[r] = m x[r] (+ y[r] if more), for rows of activations r; first is a multiple of 16. Sixteen
// rows of weights come one by one, and their lanes are then folded together: alone each would cost as much as 200 numbers.
template <class W>
inline void multiply(float* const* y, const float* const* x, int n_row, const Leaf& m, int64_t n_in, int64_t first, int64_t last,
                     bool more) {
  constexpr int R = kTile / kSums, kGroup = 8;
  const int64_t stride = padded(n_in);
  F16 sums[16 * kGroup];
  for (F16& sum : sums) sum = splat(0.0f);
  for (int64_t j = first; j < last; j += 16) {
    const int n_out = int(smaller(16, last - j));
    for (int begin = 0; begin < n_row; begin += kGroup) {
      const int n = int(smaller(kGroup, n_row - begin));
      for (int i = 0; i < n_out; ++i) {
        const W* w = static_cast<const W*>(m.w) + (j + i) * stride;
        int r = 0;
        for (; R > 1 && r + R <= n; r += R) row_sums<R>(sums + 16 * r + i, w, x + begin + r, stride);
        for (; r < n; ++r) row_sums<1>(sums + 16 * r + i, w, x + begin + r, stride);
      }
      for (int r = 0; r < n; ++r) {
        alignas(64) float dots[16];
        totals<16>(sums + 16 * r, dots);
        float* to = y[begin + r] + j;
        for (int i = 0; i < n_out; ++i) {
          const float dot = m.scale ? dots[i] * m.scale[j + i] : dots[i];
          const float out = m.b ? dot + m.b[j + i] : dot;
          to[i] = more ? to[i] + out : out;
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- norms, activations

// y = the norm of x over its first n numbers, zeros up to the next multiple of 16; gains are padded with zeros.
__attribute__((noinline)) void normalize(float* y, const float* x, const Leaf& p, int64_t n, int64_t norm, double eps) {
  const int64_t m = padded(n);
  float mean = 0.0f;
  if (norm == kLayernorm) {
    F16 sum = splat(0.0f);
    for (int64_t i = 0; i < m; i += 16) sum = sum + load(x + i);
    mean = total(sum) / float(n);
  }
  for (int64_t i = 0; i < m; i += 16) store(y + i, load(x + i) - splat(mean));
  for (int64_t i = n; i < m; ++i) y[i] = 0.0f;
  F16 sum = splat(0.0f);
  for (int64_t i = 0; i < m; i += 16) sum = fma(load(y + i), load(y + i), sum);
  const F16 scale = splat(std::sqrt(total(sum) / float(n) + float(eps)));
  const float* w = static_cast<const float*>(p.w);
  for (int64_t i = 0; i < m; i += 16) {
    const F16 z = load(y + i) / scale * load(w + i);
    store(y + i, p.b ? z + load(p.b + i) : z);
  }
}

// x Phi(x). Phi(-a) = e^(-a^2/2) q(t) with t = 1 / (1 + a/4), q of degree 9 by weighted least squares: 1.4e-8 relative.
inline F16 gelu_of(F16 x) {
  const F16 zero = splat(0.0f), one = splat(1.0f), a = where_less(x, zero, zero - x, x);
  const F16 t = one / fma(a, splat(0.25f), one);
  F16 q = splat(3.3947651373e-02f);
  for (float c : {-1.9618206125e-01f, 3.9501186846e-01f, -3.3348224809e-01f, 3.0449695112e-01f, -2.0389087326e-02f,
                  1.2156955752e-01f, 9.4819928135e-02f, 1.0022903472e-01f, -2.1601845999e-05f})
    q = fma(q, t, splat(c));
  const F16 below = q * exp_below(splat(-0.5f) * a * a);
  return x * where_less(x, zero, below, one - below);
}

inline F16 gelu_tanh_of(F16 x) {
  const F16 inner = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
  return splat(0.5f) * x * (splat(1.0f) + tanh_of(inner));
}

inline F16 silu_of(F16 x) {
  const F16 zero = splat(0.0f), one = splat(1.0f), e = exp_below(where_less(x, zero, x, zero - x));
  return x * where_less(x, zero, e, one) / (one + e);
}

inline F16 relu2_of(F16 x) {
  const F16 y = larger(x, splat(0.0f));
  return y * y;
}

__attribute__((noinline)) void activate(float* y, const float* up, int64_t mlp, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += 16) {
    const F16 x = load(y + i);
    if (mlp == kGelu) store(y + i, gelu_of(x));
    if (mlp == kGeluTanh) store(y + i, gelu_tanh_of(x));
    if (mlp == kRelu2) store(y + i, relu2_of(x));
    if (mlp == kSwiglu) store(y + i, silu_of(x) * load(up + i));
  }
}

// ------------------------------------------------------------------------------------------------------------- memory

// Floats a row: the residual stream, queries, keys, values, mixed values, the MLP's hidden numbers twice, logits.
struct Widths { int64_t x, q, kv, ff, logits; };
inline Widths widths(const Shape& s) {
  return {padded(s.d_model), padded(s.n_head * s.d_head), padded(s.n_kv_head * s.d_head), padded(s.d_ff), padded(s.n_vocab)};
}

// And a thread's own: two norms of every row, a head before and after its norm, and what it knows of the rows.
inline int64_t own_floats(const Decode& d) {
  constexpr int64_t kKnown = (3 * sizeof(int64_t) + 2 * sizeof(float*)) / sizeof(float);
  return 2 * d.n_row * padded(d.shape.d_model) + 2 * padded(d.shape.d_head) + padded(kKnown * d.n_row);
}

Attention attention_of(const Decode& d, const Layer& layer, int64_t row, const int64_t* length, float* z, const float* q,
                       const float* k, const float* v) {
  const Shape& s = d.shape;
  const int64_t n_byte = d.cache_dtype == Dtype::fp32 ? 4 : 2, h = s.d_head;
  const auto at = [&](void* cache, int64_t stride) { return static_cast<char*>(cache) + row * stride * n_byte; };
  Attention a = {};
  a.z = z, a.q = q, a.k = k, a.v = v;
  a.k_cache = at(layer.k_cache, layer.k_stride[0]), a.v_cache = at(layer.v_cache, layer.v_stride[0]);
  a.length = length, a.slopes = static_cast<const float*>(d.slopes.w);
  a.q_stride[1] = a.k_stride[1] = a.v_stride[1] = h;
  for (int i = 1; i < 3; ++i) a.k_cache_stride[i] = layer.k_stride[i], a.v_cache_stride[i] = layer.v_stride[i];
  a.n_row = 1, a.n_head = s.n_head, a.n_kv_head = s.n_kv_head, a.n_new = 1, a.d_head = h;
  a.window = s.window, a.n_block = (*length + kBlock) / kBlock;
  a.scale = float(1.0 / std::sqrt(double(h))), a.softcap = float(s.score_softcap);
  a.dtype = Dtype::fp32, a.cache_dtype = d.cache_dtype;
  return a;
}

// Where fewer pieces than threads are alive, their blocks of keys are shared out and the partial results lie here.
inline int64_t split_floats(const Decode& d) {
  const Shape& s = d.shape;
  int64_t longest = s.n_context - 1;
  const Attention a = attention_of(d, Layer{}, 0, &longest, nullptr, nullptr, nullptr, nullptr);
  return int64_t(partial_bytes(a) / sizeof(float));
}

int64_t decode_floats(const Decode& d, int n_thread) {
  const Widths w = widths(d.shape);
  const int64_t rows = w.x + 2 * w.q + 2 * w.kv + 2 * w.ff + w.logits;
  const int64_t split = smaller(d.n_row, (n_thread - 1) / d.shape.n_kv_head) * split_floats(d);
  return d.n_row * rows + split + n_thread * own_floats(d);
}

size_t decode_scratch(const Decode& d) {  // the most that attend and sample ask for, before anybody waits for anybody
  Attention a = {};
  a.d_head = d.shape.d_head;
  const size_t draw = size_t((d.shape.n_vocab + 127) / 64 * 64) * 40, look = size_t(piece_floats(a)) * sizeof(float);
  return draw > look ? draw : look;
}

// -------------------------------------------------------------------------------------------------------------- steps

// One thread of the team. Every thread holds the same view of who is alive and how long; buffers are everybody's.
template <class W>
struct Worker {
  const Decode& d;
  const Shape& s;
  Team& team;
  const int thread, n_thread;
  const Widths wide;
  float *x_all, *q_all, *k_all, *v_all, *z_all, *up_all, *ff_all, *logits_all, *split_all, *seen_all, *other_all, *normed;
  int n_live = 0;
  int64_t *live, *length, *position;  // (B) each
  const float **in;
  float **out;

  Worker(const Decode& decode, Team& its_team, int index, int n)
      : d(decode), s(decode.shape), team(its_team), thread(index), n_thread(n), wide(widths(decode.shape)) {
    float* next = d.memory;
    const auto take = [&](int64_t n_float) { return std::exchange(next, next + n_float); };
    x_all = take(d.n_row * wide.x), q_all = take(d.n_row * wide.q), k_all = take(d.n_row * wide.kv);
    v_all = take(d.n_row * wide.kv), z_all = take(d.n_row * wide.q), up_all = take(d.n_row * wide.ff);
    ff_all = take(d.n_row * wide.ff), logits_all = take(d.n_row * wide.logits);
    split_all = take(smaller(d.n_row, (n_thread - 1) / s.n_kv_head) * split_floats(d));
    next += thread * own_floats(d);
    seen_all = take(d.n_row * wide.x), other_all = take(d.n_row * wide.x), normed = take(2 * padded(s.d_head));
    live = reinterpret_cast<int64_t*>(next), length = live + d.n_row, position = length + d.n_row;
    in = reinterpret_cast<const float**>(position + d.n_row), out = const_cast<float**>(in + d.n_row);
  }

  // This thread's share of n numbers, in sixteens: nobody else writes to the same line of the cache.
  void share(int64_t n, int64_t* first, int64_t* last) const {
    const int64_t n_line = (n + 15) / 16;
    *first = n_line * thread / n_thread * 16, *last = smaller(n, n_line * (thread + 1) / n_thread * 16);
  }

  // y = m x (+ y if more): this thread's rows of m, for every living row of the batch.
  void times(float* y, int64_t y_width, const float* x, int64_t x_width, const Leaf& m, int64_t n_out, int64_t n_in, bool more = false) {
    int64_t first, last;
    share(n_out, &first, &last);
    for (int r = 0; r < n_live; ++r) in[r] = x + live[r] * x_width, out[r] = y + live[r] * y_width;
    multiply<W>(out, in, n_live, m, n_in, first, last, more);
  }

  void norm_all(float* y, const Leaf& p) {
    for (int r = 0; r < n_live; ++r) normalize(y + live[r] * wide.x, x_all + live[r] * wide.x, p, s.d_model, s.norm, s.norm_eps);
  }

  void embed(int64_t b, int64_t token) {
    float* x = x_all + b * wide.x;
    const W* w = static_cast<const W*>(d.embed.w) + token * wide.x;
    const float scale = (d.embed.scale ? d.embed.scale[token] : 1.0f), more = float(s.embed_scale);
    const float* position_row = d.positions.w ? static_cast<const float*>(d.positions.w) + length[b] * wide.x : nullptr;
    for (int64_t i = 0; i < wide.x; i += 16) {
      const F16 y = load(w + i) * splat(scale) * splat(more);
      store(x + i, position_row ? y + load(position_row + i) : y);
    }
  }

  void head_norm(float* x, const Leaf& p) {
    if (!p.w) return;
    float *padded_x = normed, *y = normed + padded(s.d_head);
    widen_row(padded_x, x, s.d_head);
    normalize(y, padded_x, p, s.d_head, kRmsnorm, s.norm_eps);
    for (int64_t i = 0; i < s.d_head; ++i) x[i] = y[i];
  }

  // Queries and the key of one row and key head get their norm and their turn, and the cache its new entry.
  void prepare(const Layer& layer, const Attention& a, int64_t b, int64_t group) {
    const int64_t per_group = s.n_head / s.n_kv_head, half = s.d_rot / 2;
    const float* cos = static_cast<const float*>(d.cos.w) + length[b] * half;
    const float* sin = static_cast<const float*>(d.sin.w) + length[b] * half;
    const auto finish = [&](float* x, const Leaf& p) {
      head_norm(x, p);
      if (half) rotate(x, cos, sin, half, s.rope_interleaved);
    };
    for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h) finish(q_all + b * wide.q + h * s.d_head, layer.q_norm);
    finish(k_all + b * wide.kv + group * s.d_head, layer.k_norm);
    append_(a, group, group + 1);
  }

  Attention of(const Layer& layer, int64_t b) const {
    return attention_of(d, layer, b, length + b, z_all + b * wide.q, q_all + b * wide.q, k_all + b * wide.kv, v_all + b * wide.kv);
  }

  void attend_all(const Layer& layer) {
    const int64_t n_pair = n_live * s.n_kv_head;
    int64_t n_block = 1;
    for (int r = 0; r < n_live; ++r) n_block = length[live[r]] / kBlock + 1 > n_block ? length[live[r]] / kBlock + 1 : n_block;
    const bool split = n_pair < n_thread && n_block > 1;
    for (int64_t pair = n_pair * thread / n_thread; pair < n_pair * (thread + 1) / n_thread; ++pair) {
      const int64_t b = live[pair / s.n_kv_head], group = pair % s.n_kv_head;
      const Attention a = of(layer, b);
      prepare(layer, a, b, group);
      if (!split) attend(a, group * n_pieces(a), (group + 1) * n_pieces(a));
    }
    if (!split) return;
    team.meet();
    int64_t number = 0;  // of a piece's block
    for (int r = 0; r < n_live; ++r) {
      const Attention a = of(layer, live[r]);
      for (int64_t i = 0; i < attend_units(a) * a.n_block; ++i)
        if (number++ % n_thread == thread) attend_partial(a, split_all + r * split_floats(d), i, i + 1);
    }
    team.meet();
    number = 0;
    for (int r = 0; r < n_live; ++r) {
      const Attention a = of(layer, live[r]);
      for (int64_t i = 0; i < attend_units(a); ++i)
        if (number++ % n_thread == thread) attend_merge(a, split_all + r * split_floats(d), i, i + 1);
    }
  }

  void hidden(const Layer& layer, const float* seen) {
    int64_t first, last;
    share(s.d_ff, &first, &last);
    times(ff_all, wide.ff, seen, wide.x, layer.gate.w ? layer.gate : layer.up, s.d_ff, s.d_model);
    if (layer.gate.w) times(up_all, wide.ff, seen, wide.x, layer.up, s.d_ff, s.d_model);
    for (int r = 0; r < n_live; ++r) activate(ff_all + live[r] * wide.ff, up_all + live[r] * wide.ff, s.mlp, first, last);
  }

  void block(const Layer& layer) {
    const int64_t n_q = s.n_head * s.d_head, n_kv = s.n_kv_head * s.d_head;
    norm_all(seen_all, layer.norm_1);
    times(q_all, wide.q, seen_all, wide.x, layer.q, n_q, s.d_model);
    times(k_all, wide.kv, seen_all, wide.x, layer.k, n_kv, s.d_model);
    times(v_all, wide.kv, seen_all, wide.x, layer.v, n_kv, s.d_model);
    if (s.block != kSequential) {
      if (layer.norm_2.w) norm_all(other_all, layer.norm_2);
      hidden(layer, layer.norm_2.w ? other_all : seen_all);
    }
    team.meet();
    attend_all(layer);
    team.meet();
    times(x_all, wide.x, z_all, wide.q, layer.o, s.d_model, n_q, true);
    if (s.block == kSequential) {
      team.meet();
      norm_all(seen_all, layer.norm_2);
      hidden(layer, seen_all);
      team.meet();
    }
    times(x_all, wide.x, ff_all, wide.ff, layer.down, s.d_model, s.d_ff, true);
    team.meet();
  }

  void predict() {
    int64_t first, last;
    norm_all(seen_all, d.norm_f);
    share(s.n_vocab, &first, &last);
    const Leaf m = {d.head.w ? d.head.w : d.embed.w, d.head.b, d.head.w ? d.head.scale : d.embed.scale};
    times(logits_all, wide.logits, seen_all, wide.x, m, s.n_vocab, s.d_model);
    const F16 cap = splat(float(s.logit_softcap));
    for (int r = 0; r < n_live && s.logit_softcap != 0; ++r) {
      float* z = logits_all + live[r] * wide.logits;
      for (int64_t i = first; i < last; i += 16) store(z + i, cap * tanh_of(load(z + i) / cap));
    }
    team.meet();
  }

  bool goes_on(int64_t b, int64_t token) const {
    if (token < 0 || length[b] == s.n_context) return false;
    for (int64_t i = 0; i < d.n_stop; ++i)
      if (token == d.stop[i]) return false;
    return true;
  }

  // Draw for this thread's rows, begin their next step, and agree on who goes on.
  void draw(int64_t step) {
    for (int r = 0; r < n_live; ++r) ++length[live[r]];
    for (int r = thread; r < n_live; r += n_thread) {
      const int64_t b = live[r];
      Sampling one = d.sampling;
      int64_t* token = d.drawn + b * d.n_step + step;
      one.tokens = token, one.logits = logits_all + b * wide.logits;
      one.seed += b * one.seed_stride, one.position = position + b;
      sample(one, 0, 1);
      if (goes_on(b, *token)) embed(b, *token);
      d.new_length[b] = length[b];
    }
    team.meet();
    int n = 0;
    for (int r = 0; r < n_live; ++r) {
      const int64_t b = live[r];
      ++position[b];
      if (goes_on(b, d.drawn[b * d.n_step + step])) live[n++] = b;
    }
    n_live = n;
  }

  void run() {
    for (int64_t b = 0; b < d.n_row; ++b) {
      length[b] = d.length[b], position[b] = d.position[b];
      if (thread == 0) d.new_length[b] = length[b];
      if (length[b] < s.n_context) live[n_live++] = b;
    }
    for (int r = thread; r < n_live; r += n_thread) embed(live[r], d.tokens[live[r]]);
    team.meet();
    for (int64_t step = 0; step < d.n_step && n_live; ++step) {
      for (int64_t i = 0; i < s.n_layer; ++i) block(d.layers[i]);
      predict();
      draw(step);
    }
  }
};

void decode(const Decode& d, Team& team, int thread, int n_thread) {
  if (d.weights == Weights::fp32) Worker<float>(d, team, thread, n_thread).run();
  if (d.weights == Weights::bf16) Worker<bf16>(d, team, thread, n_thread).run();
  if (d.weights == Weights::int8) Worker<int8>(d, team, thread, n_thread).run();
}
