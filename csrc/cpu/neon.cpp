// NEON on 64-bit ARM, where every machine has it: sixteen floats are four registers.
#include "includes.h"

#include <arm_neon.h>

namespace gptcore {
namespace {

#define UNROLL _Pragma("GCC unroll 16")  // sums in an array become registers
#include "../kernels/convert.h"

struct F16 { float32x4_t v[4]; };
constexpr int kTile = 4, kWide = 2;

template <class Of>
inline F16 each(Of of) { return {{of(0), of(1), of(2), of(3)}}; }
inline F16 operator+(F16 a, F16 b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline F16 operator-(F16 a, F16 b) { return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
inline F16 operator*(F16 a, F16 b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline F16 operator/(F16 a, F16 b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
inline F16 splat(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
inline F16 fma(F16 a, F16 b, F16 c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline F16 larger(F16 a, F16 b) { return each([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
inline F16 where_less(F16 a, F16 b, F16 x, F16 y) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
}
inline F16 times_2n(F16 p, F16 t) {
  return each([&](int i) {
    const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(t.v[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p.v[i]), power));
  });
}

inline F16 load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline F16 load(const bf16* p) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p[4 * i].bits), 16)); });
}
inline F16 load(const fp16* p) {
  return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * i].bits))); });
}
inline F16 load(const int8* p) {
  const int8x16_t x = vld1q_s8(&p->v);
  const int16x8_t lo = vmovl_s8(vget_low_s8(x)), hi = vmovl_s8(vget_high_s8(x));
  const auto wide = [](int16x4_t y) { return vcvtq_f32_s32(vmovl_s16(y)); };
  return {{wide(vget_low_s16(lo)), wide(vget_high_s16(lo)), wide(vget_low_s16(hi)), wide(vget_high_s16(hi))}};
}
template <class T>
inline F16 load(const T* p, int n) {
  T some[16] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}
inline void touch(const void*) {}
inline void store(float* p, F16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}

inline float total(F16 x) {  // lanes i and i+8 first: registers 0 and 2, 1 and 3
  const float32x4_t a = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
inline float top(F16 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[2]), vmaxq_f32(x.v[1], x.v[3]))); }

#include "../kernels/lanes.h"
#include "../kernels/attention.h"
#include "../kernels/sample.h"
#include "../kernels/decode.h"
#include "../kernels/weigh.h"

constexpr Isa kIsa = {"neon", append_, attend_units, attend, partial_bytes, attend_partial, attend_merge, sample,
                      decode_floats, decode_scratch, decode, weigh};

}  // namespace

const Isa* neon() { return &kIsa; }

}  // namespace gptcore
