// Numbers as the GPU kernels need them: storage formats by shifting bits, and e^x and tanh of our own, the same bits on
// every machine. The one-number-at-a-time twins of kernels/convert.h and kernels/lanes.h, for the device.
#pragma once
#include "../kernels/types.h"
#include "port.h"

namespace gptcore::gpu {

constexpr float kInfinity = __builtin_inff();

DEVICE uint32_t bits_of(float x) { uint32_t b; __builtin_memcpy(&b, &x, 4); return b; }
DEVICE float float_of(uint32_t b) { float x; __builtin_memcpy(&x, &b, 4); return x; }

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
DEVICE float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  const uint32_t size = bits_of(times(float_of(magnitude << 13), 5.192296858534828e33f));  // 2^112: another bias
  return float_of(sign | (magnitude < 0x7c00 ? size : 0x7f800000 | (magnitude & 0x3ff) << 13));  // infinity and NaN
}

DEVICE void narrow(float x, float* to) { *to = x; }
DEVICE void narrow(float x, bf16* to) {  // to the nearest, ties to even
  const uint32_t b = bits_of(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
DEVICE void narrow(float x, fp16* to) {  // to the nearest, ties to even
  const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
  uint32_t h = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  if (size < 0x38800000) h = bits_of(float_of(size) + 0.5f) - 0x3f000000;  // denormal: the hardware rounds ten bits
  if (size >= 0x477ff000) h = x != x ? 0x7e00 : 0x7c00;                    // 65520 and beyond
  to->bits = uint16_t(sign | h);
}

// Number i of a buffer whose type is known when it is read: for what is read once.
DEVICE float load_any(const void* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(from)[i];
  if (dtype == Dtype::bf16) return widen(static_cast<const bf16*>(from)[i]);
  return widen(static_cast<const fp16*>(from)[i]);
}
DEVICE void store_any(float x, void* to, Dtype dtype, int64_t i) {
  if (dtype == Dtype::fp32) narrow(x, static_cast<float*>(to) + i);
  if (dtype == Dtype::bf16) narrow(x, static_cast<bf16*>(to) + i);
  if (dtype == Dtype::fp16) narrow(x, static_cast<fp16*>(to) + i);
}

// Eight numbers, by 16 bytes at a time where they lie so; else n of them, one by one, and zeros.
template <class T>
DEVICE void load8(float* x, const T* from, int64_t n, bool wide) {
  if (wide) {
    Sixteen words[sizeof(T) / 2];
    UNROLL
    for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = load16(from + 16 / sizeof(T) * i);
    T raw[8];
    __builtin_memcpy(raw, words, sizeof raw);
    UNROLL
    for (int i = 0; i < 8; ++i) x[i] = widen(raw[i]);
  } else {
    UNROLL
    for (int i = 0; i < 8; ++i) x[i] = i < n ? widen(from[i]) : 0.0f;
  }
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to the nearest whole number

// e^x for x <= 0 to about one part in 10^7, 0 below -87; NaN stays NaN.  Cephes' expf: x = n ln 2 + r, a polynomial in r.
DEVICE float exp_below(float x) {
  const float t = fused(x, 1.44269504f, kRound), n = plus(t, -kRound);
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  float p = fused(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f), p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f), p = fused(p, r, 5.0000001201e-1f);
  p = plus(fused(p, times(r, r), r), 1.0f);
  return x < -87.0f ? 0.0f : float_of(bits_of(p) + (bits_of(t) << 23));
}

// tanh, Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2|x| + 1) would lose digits, and that beyond.
DEVICE float tanh_of(float x) {
  const float size = x < 0 ? -x : x, y = times(x, x);
  if (size < 0.625f) {
    float p = fused(-5.70498872745e-3f, y, 2.06390887954e-2f);
    p = fused(p, y, -5.37397155531e-2f), p = fused(p, y, 1.33314422036e-1f), p = fused(p, y, -3.33332819422e-1f);
    return fused(times(p, y), x, x);
  }
  const float e = exp_below(-2.0f * size), far = (1.0f - e) / (1.0f + e);
  return x < 0 ? -far : far;
}

DEVICE float larger(float a, float b) { return a > b ? a : b; }
DEVICE float shuffle_xor(float x, int mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
DEVICE uint64_t shuffle_xor(uint64_t x, int mask) {
  return uint64_t(shuffle_xor(uint32_t(x >> 32), mask)) << 32 | shuffle_xor(uint32_t(x), mask);
}
DEVICE uint64_t shuffle_up(uint64_t x, int by) {
  return uint64_t(shuffle_up(uint32_t(x >> 32), by)) << 32 | shuffle_up(uint32_t(x), by);
}

}  // namespace gptcore::gpu
