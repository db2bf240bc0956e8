// Plain C++: sixteen floats are an array. Any machine, any compiler; multiplications and additions are rounded apart.
#include "includes.h"

namespace gptcore {
namespace {

#define UNROLL  // the lanes are a loop already
#include "../kernels/convert.h"

struct F16 { float v[16]; };
constexpr int kTile = 4, kWide = 2;

template <class Of>
inline F16 each(Of of) {
  F16 y;
  for (int i = 0; i < 16; ++i) y.v[i] = of(i);
  return y;
}
inline F16 operator+(const F16& a, const F16& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F16 operator-(const F16& a, const F16& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F16 operator*(const F16& a, const F16& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F16 operator/(const F16& a, const F16& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline F16 splat(float x) { return each([&](int) { return x; }); }
inline F16 fma(const F16& a, const F16& b, const F16& c) { return a * b + c; }
inline F16 larger(const F16& a, const F16& b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F16 where_less(const F16& a, const F16& b, const F16& x, const F16& y) {
  return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline F16 times_2n(const F16& p, const F16& t) {
  return each([&](int i) { return float_of(bits_of(p.v[i]) + (bits_of(t.v[i]) << 23)); });
}
template <class T>
inline F16 load(const T* p) { return each([&](int i) { return widen(p[i]); }); }
template <class T>
inline F16 load(const T* p, int n) { return each([&](int i) { return i < n ? widen(p[i]) : 0.0f; }); }
inline void touch(const void*) {}
inline void store(float* p, const F16& x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
inline float total(F16 x) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  return x.v[0];
}
inline float top(F16 x) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] = x.v[i] > x.v[i + n] ? x.v[i] : x.v[i + n];
  return x.v[0];
}

#include "../kernels/lanes.h"
#include "../kernels/attention.h"
#include "../kernels/sample.h"
#include "../kernels/decode.h"
#include "../kernels/weigh.h"

constexpr Isa kIsa = {"generic", append_, attend_units, attend, partial_bytes, attend_partial, attend_merge, sample,
                      decode_floats, decode_scratch, decode, weigh};

}  // namespace

const Isa* generic() { return &kIsa; }

}  // namespace gptcore
