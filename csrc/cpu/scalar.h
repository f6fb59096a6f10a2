#pragma once

#include "simd.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

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

// A vector's worth of elements in memory, as the vector that arithmetic uses.
template <class T>
LCR2S_INLINE Vec<T> load_accumulate(const T* p) {
  return load(p);
}
LCR2S_INLINE Vec<float> load_accumulate(const BFloat16* p) {
  typedef uint16_t Bits __attribute__((vector_size(LCR2S_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(LCR2S_VECTOR_BYTES)));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Wide) << 16);
}
LCR2S_INLINE Vec<float> load_accumulate(const Half* p) {
#if LCR2S_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LCR2S_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa moved into place and rescaled by 2^112 (exact, subnormals too); infinity and NaN keep theirs.
  typedef uint16_t Bits __attribute__((vector_size(LCR2S_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(LCR2S_VECTOR_BYTES)));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  const Wide wide = __builtin_convertvector(bits, Wide);
  const Wide finite = (Wide)((Vec<float>)((wide & 0x7fffu) << 13) * 0x1p112f);
  const Wide special = (Wide)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vec<float>)(finite | special | ((wide & 0x8000u) << 16));
#endif
}
template <class T>
LCR2S_INLINE Vec<Accumulate<T>> load_accumulate(const T* p, int n) {
  T lanes[kLanes<Accumulate<T>>] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load_accumulate(lanes);
}

// Back to memory, rounded to nearest even.
template <class T>
LCR2S_INLINE void store_accumulate(T* p, Vec<T> v) {
  store(p, v);
}
LCR2S_INLINE void store_accumulate(BFloat16* p, Vec<float> v) {
  typedef uint16_t Bits __attribute__((vector_size(LCR2S_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(LCR2S_VECTOR_BYTES)));
  const Wide wide = (Wide)v;
  const Wide rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const Bits bits = __builtin_convertvector(v != v ? Wide{} + 0x7fc0u : rounded, Bits);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
LCR2S_INLINE void store_accumulate(Half* p, Vec<float> v) {
#if LCR2S_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LCR2S_VECTOR_BYTES == 32 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}
template <class T>
LCR2S_INLINE void store_accumulate(T* p, Vec<Accumulate<T>> v, int n) {
  T lanes[kLanes<Accumulate<T>>];
  store_accumulate(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace lcr2s::cpu::LCR2S_ISA
