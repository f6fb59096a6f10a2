#pragma once

#include "simd.h"

// Element types in memory. Arithmetic is in float for the half types (Accumulate<T>), in T otherwise.
namespace lcr2s::cpu::LCR2S_ISA {

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

LCR2S_INLINE float to_accumulate(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof(y));
  return y;
}
LCR2S_INLINE float to_accumulate(Half x) { return static_cast<float>(x); }
LCR2S_INLINE float to_accumulate(float x) { return x; }
LCR2S_INLINE double to_accumulate(double x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
LCR2S_INLINE T from_accumulate(Accumulate<T> x) {
  return static_cast<T>(x);
}
template <>
LCR2S_INLINE BFloat16 from_accumulate<BFloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace lcr2s::cpu::LCR2S_ISA
