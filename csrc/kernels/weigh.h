// weigh_: a row of logits becomes its own gradient, but for a factor: e^(z - top), less their sum at the target.
// One pass for the largest, one for everything else; the row stays in the nearest cache. Arithmetic is float.
// Ladder, benchmarks/bench_train.py's head (N 4,096, V 8,192, bfloat16): see docs/where-the-time-goes.md.
// To be included inside an instruction set's region, hence no include and no guard.

constexpr int64_t kSpan = 256;  // floats between two roundings to the stored type: a loop that compilers make vectors of

template <class T>
inline float largest(const T* row, int64_t n) {
  F16 best = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) best = larger(load(row + i), best);
  float most = top(best);
  for (; i < n; ++i) most = widen(row[i]) > most ? widen(row[i]) : most;
  return most;
}

template <class T>
void weigh_row(T* row, int64_t target, int64_t n_vocab, int64_t n_padded, float cap, float* sum, float* nats) {
  const F16 inverse = splat(cap ? 1.0f / cap : 0.0f), one = splat(1.0f);
  const auto capped = [&](F16 z) { return cap ? splat(cap) * tanh_of(z * inverse) : z; };
  alignas(64) float e[kSpan];
  const auto alone = [&](float z) { return store(e, capped(splat(z))), e[0]; };
  const float best = alone(largest(row, n_vocab)), wanted = alone(widen(row[target]));
  F16 all = splat(0.0f);
  for (int64_t first = 0; first < n_vocab; first += kSpan) {
    const int64_t n = n_vocab - first < kSpan ? n_vocab - first : kSpan;
    for (int64_t i = 0; i < n; i += 16) {
      const bool whole = i + 16 <= n;
      const F16 z = capped(whole ? load(row + first + i) : load(row + first + i, int(n - i)));
      F16 x = exp_below(z - splat(best));
      if (!whole) {  // what lies beyond the vocabulary weighs nothing
        store(e + i, x);
        for (int64_t j = n; j < i + 16; ++j) e[j] = 0.0f;
        x = load(e + i);
      }
      all = all + x;
      const F16 t = z * inverse;
      store(e + i, cap ? x * (one - t * t) : x);
    }
    for (int64_t i = 0; i < n; ++i) narrow(e[i], row + first + i);
  }
  const float weight = total(all), t = cap ? wanted / cap : 0.0f;
  store(e, exp_below(splat(wanted - best)));
  narrow((e[0] - weight) * (1.0f - t * t), row + target);
  for (int64_t i = n_vocab; i < n_padded; ++i) narrow(0.0f, row + i);
  *sum = weight;
  *nats = std::log(weight) + best - wanted;
}

void weigh(const Weighing& w, int64_t first, int64_t last) {
  with_type(w.dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t i = first; i < last; ++i)
      weigh_row(static_cast<T*>(w.logits) + i * w.stride, w.targets[i], w.n_vocab, w.n_padded, w.softcap, w.sums + i, w.nats + i);
  });
}
