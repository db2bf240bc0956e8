// Sixteen floats at a time: what attention and sampling share, in the words that each instruction set defines.
// Those are F16 with + - * /, load, store, splat, fma (one rounding where the machine has it), larger, where_less(a, b,
// x, y) = a < b ? x : y, times_2n(p, t) = p * 2^n for t = n + kRound, total (lanes i and i+8 are added first, then i+4,
// i+2, i+1), top, and touch, which loads a line of the cache for nothing but its coming. To be included inside an
// instruction set's region, hence no include and no guard.

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to the nearest whole number

// e^x for x <= 0 to about one part in 10^7, 0 below -87; NaN stays NaN.  Cephes' expf: x = n ln 2 + r, a polynomial in r.
inline F16 exp_below(F16 x) {
  const F16 t = fma(x, splat(1.44269504f), splat(kRound)), n = t - splat(kRound);
  const F16 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  F16 p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  p = times_2n(fma(p, r * r, r) + splat(1.0f), t);
  return where_less(x, splat(-87.0f), splat(0.0f), p);
}

// tanh, Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2|x| + 1) would lose digits, and that beyond.
inline F16 tanh_of(F16 x) {
  const F16 zero = splat(0.0f), one = splat(1.0f), size = where_less(x, zero, zero - x, x), y = x * x;
  F16 p = splat(-5.70498872745e-3f);
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) p = fma(p, y, splat(c));
  const F16 near = fma(p * y, x, x), e = exp_below(splat(-2.0f) * size), far = (one - e) / (one + e);
  return where_less(size, splat(0.625f), near, where_less(x, zero, zero - far, far));
}

template <int N>
inline void totals(const F16* x, float* sums) {
  for (int i = 0; i < N; ++i) sums[i] = total(x[i]);
}

// n numbers widened into floats, zeros up to the next multiple of sixteen.
template <class T>
inline void widen_row(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, int(n - i)));
}

template <class Use>
inline void with_type(Dtype dtype, Use use) {  // use(a null pointer of the stored type)
  if (dtype == Dtype::fp32) use(static_cast<float*>(nullptr));
  if (dtype == Dtype::bf16) use(static_cast<bf16*>(nullptr));
  if (dtype == Dtype::fp16) use(static_cast<fp16*>(nullptr));
}
