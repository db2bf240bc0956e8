// AVX2 with FMA and F16C: sixteen floats are two registers.
#include "includes.h"

#include <immintrin.h>

namespace gptcore {

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

#define UNROLL _Pragma("GCC unroll 16")  // sums in an array become registers
#include "../kernels/convert.h"

struct F16 { __m256 lo, hi; };
constexpr int kTile = 4, kWide = 2;  // sixteen registers, two for each sum

inline F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F16 larger(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 where_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline __m256 half_times_2n(__m256 p, __m256 t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
inline F16 times_2n(F16 p, F16 t) { return {half_times_2n(p.lo, t.lo), half_times_2n(p.hi, t.hi)}; }

inline __m256 wide_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
template <class T>
inline __m128i eight(const T* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load(const bf16* p) { return {wide_bf16(eight(p)), wide_bf16(eight(p + 8))}; }
inline F16 load(const fp16* p) { return {_mm256_cvtph_ps(eight(p)), _mm256_cvtph_ps(eight(p + 8))}; }
inline __m256 wide_int8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
inline F16 load(const int8* p) { return {wide_int8(eight(p)), wide_int8(_mm_srli_si128(eight(p), 8))}; }
template <class T>
inline F16 load(const T* p, int n) {
  T some[16] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}
inline void touch(const void* line) { asm volatile("" ::"x"(_mm256_loadu_si256(static_cast<const __m256i*>(line)))); }
inline void store(float* p, F16 x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }

inline float total(F16 x) {
  const __m256 a = _mm256_add_ps(x.lo, x.hi);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float top(F16 x) {
  const __m256 a = _mm256_max_ps(x.lo, x.hi);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

#include "../kernels/lanes.h"
#include "../kernels/attention.h"
#include "../kernels/sample.h"
#include "../kernels/decode.h"
#include "../kernels/weigh.h"

constexpr Isa kIsa = {"avx2", append_, attend_units, attend, partial_bytes, attend_partial, attend_merge, sample,
                      decode_floats, decode_scratch, decode, weigh};

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Isa* avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kIsa : nullptr;  // F16C is older than both
}

}  // namespace gptcore
