#pragma once

#include <cstdint>
#include <cstring>

// Element types and their arithmetic types for device code. Everything here compiles for the host too, where it is
// tested.
#ifdef __CUDACC__
#define LCR2S_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LCR2S_HOST_DEVICE inline
#endif

namespace lcr2s::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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

LCR2S_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
LCR2S_HOST_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LCR2S_HOST_DEVICE float to_accumulate(float x) { return x; }
LCR2S_HOST_DEVICE double to_accumulate(double x) { return x; }
LCR2S_HOST_DEVICE float to_accumulate(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
LCR2S_HOST_DEVICE float to_accumulate(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Exponent and mantissa moved into place and rescaled by 2^112 (exact, subnormals too); infinity and NaN keep theirs.
  const uint32_t wide = x.bits;
  uint32_t bits = bits_of_float(float_of_bits((wide & 0x7fffu) << 13) * 5192296858534827628530496329220096.0f);
  if ((wide & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return float_of_bits(bits | ((wide & 0x8000u) << 16));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
LCR2S_HOST_DEVICE T from_accumulate(Accumulate<T> x) {
  return x;
}
template <>
LCR2S_HOST_DEVICE BFloat16 from_accumulate<BFloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
LCR2S_HOST_DEVICE Half from_accumulate<Half>(float x) {
#ifdef __CUDA_ARCH__
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return Half{y};
#else
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Half{0x7e00};
  if (magnitude >= 0x477ff000u) return Half{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the last kept bit at the end of the mantissa and rounds there.
    return Half{static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return Half{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// `Size` neighbouring elements, read and written at once: 16 bytes where rows are aligned.
template <class T, int Size>
struct alignas(sizeof(T) * Size) Pack {
  T at[Size];
};

template <class T, int Size>
LCR2S_HOST_DEVICE Pack<T, Size> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, Size>*>(p);
}
template <class T, int Size>
LCR2S_HOST_DEVICE void store_pack(T* p, const Pack<T, Size>& pack) {
  *reinterpret_cast<Pack<T, Size>*>(p) = pack;
}

}  // namespace lcr2s::cuda
