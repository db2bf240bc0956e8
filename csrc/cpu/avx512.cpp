// AVX-512: sixteen floats are one register, and sixteen sums are folded at once.
#include "includes.h"

#include <immintrin.h>

namespace gptcore {

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace {

#define UNROLL _Pragma("GCC unroll 16")  // sums in an array become registers
#include "../kernels/convert.h"

struct F16 { __m512 v; };
constexpr int kTile = 16, kWide = 8;

inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 larger(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 where_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline F16 times_2n(F16 p, F16 t) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}

inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
inline F16 wide_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const bf16* p) { return wide_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F16 load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline F16 load(const int8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F16 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline F16 load(const bf16* p, int n) { return wide_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline F16 load(const fp16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline void touch(const void* line) { asm volatile("" ::"v"(_mm512_loadu_si512(line))); }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }

inline float total(F16 x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float top(F16 x) { return _mm512_reduce_max_ps(x.v); }

#include "../kernels/lanes.h"

// sums[i] = total(x[i]), by the same tree: 30 shuffles instead of 64.
template <>
inline void totals<16>(const F16* x, float* sums) {
  __m512 a[8], b[4], c[2];
  UNROLL
  for (int i = 0; i < 8; ++i) {  // x[i % 4 + 8 (i / 4)] beside the one four further on
    const __m512 u = x[i % 4 + i / 4 * 8].v, v = x[i % 4 + i / 4 * 8 + 4].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x44), _mm512_shuffle_f32x4(u, v, 0xee));
  }
  UNROLL
  for (int i = 0; i < 4; ++i)  // a quarter each of x[i], x[i + 4], x[i + 8], x[i + 12]
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  UNROLL
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd)));
}

#include "../kernels/attention.h"
#include "../kernels/sample.h"
#include "../kernels/decode.h"
#include "../kernels/weigh.h"

constexpr Isa kIsa = {"avx512", append_, attend_units, attend, partial_bytes, attend_partial, attend_merge, sample,
                      decode_floats, decode_scratch, decode, weigh};

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Isa* avx512() {
  __builtin_cpu_init();
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  return here ? &kIsa : nullptr;  // every machine with AVX-512 has F16C, which old compilers cannot ask for
}

}  // namespace gptcore
