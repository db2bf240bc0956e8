// Between storage and float, one number at a time: what the instruction sets do by sixteen must agree with this.
// To be included inside an instruction set's region (see cpu/avx512.cpp), hence no include and no guard.

inline uint32_t bits_of(float x) { uint32_t b; __builtin_memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; __builtin_memcpy(&x, &b, 4); return x; }

inline float widen(float x) { return x; }
inline float widen(int8 x) { return float(x.v); }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);      // infinity and NaN
  const float size = float_of(magnitude << 13) * 0x1p112f;  // the exponent's bias is 127 instead of 15, denormals too
  return float_of(sign | bits_of(size));
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {  // to the nearest, ties to even
  const uint32_t b = bits_of(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline void narrow(float x, fp16* to) {  // to the nearest, ties to even
  const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
  if (x != x) { to->bits = uint16_t(sign | 0x7e00); return; }
  if (size >= 0x477ff000) { to->bits = uint16_t(sign | 0x7c00); return; }                       // 65520 and beyond
  if (size < 0x38800000) {  // denormal: adding 0.5 leaves the last ten bits, rounded by the hardware
    to->bits = uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
    return;
  }
  to->bits = uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
