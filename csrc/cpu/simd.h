#pragma once

#include <cstdint>
#include <cstring>

// SIMD through the compiler's vector extensions: one source for AVX-512, AVX2 and any other machine. The build compiles
// each family once per instruction set with LCR2S_ISA (namespace) and LCR2S_VECTOR_BYTES (vector width) set. Everything
// here lives in that namespace, is inlined, and uses no template of the standard library: a function shared between
// differently compiled copies could bring instructions to a processor that lacks them.
#ifndef LCR2S_ISA
#error "compile through CMakeLists.txt, which sets LCR2S_ISA and LCR2S_VECTOR_BYTES"
#endif

#define LCR2S_INLINE inline __attribute__((always_inline))

namespace lcr2s::cpu::LCR2S_ISA {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(LCR2S_VECTOR_BYTES), may_alias));
  typedef int32_t mask __attribute__((vector_size(LCR2S_VECTOR_BYTES), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(LCR2S_VECTOR_BYTES), may_alias));
  typedef int64_t mask __attribute__((vector_size(LCR2S_VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Mask = typename VecOf<T>::mask;
template <class T>
constexpr int kLanes = LCR2S_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
LCR2S_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
LCR2S_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
LCR2S_INLINE Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}
// kLanes<double> elements as doubles, and back, rounded.
LCR2S_INLINE Vec<double> load_double(const double* p) { return load(p); }
LCR2S_INLINE void store_double(double* p, Vec<double> v) { store(p, v); }
typedef float HalfVecOfFloat __attribute__((vector_size(LCR2S_VECTOR_BYTES / 2)));
LCR2S_INLINE Vec<double> load_double(const float* p) {
  HalfVecOfFloat v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
}
LCR2S_INLINE void store_double(float* p, Vec<double> v) {
  const HalfVecOfFloat rounded = __builtin_convertvector(v, HalfVecOfFloat);
  __builtin_memcpy(p, &rounded, sizeof(rounded));
}
// v itself, as one rounded value: without this a product may or may not be contracted with the sum it goes into, and
// the same logit would differ between two passes.
template <class T>
LCR2S_INLINE Vec<T> rounded(Vec<T> v) {
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(v);
#else
  return v;
#endif
}
// The first n lanes; the others are zero.
template <class T>
LCR2S_INLINE Vec<T> load_partial(const T* p, int n) {
  Vec<T> v{};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}
template <class T>
LCR2S_INLINE void store_partial(T* p, Vec<T> v, int n) {
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}
template <class T>
LCR2S_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The lanes 0, 1, ... as a pack.
template <int... I>
struct LaneList {};
template <int Count, int... I>
struct LanesUpTo : LanesUpTo<Count - 1, Count - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using List = LaneList<I...>;
};
// x and y with every 2 * Half lanes added into Half: Half lanes of x, then Half of y, in turn.
template <class T, int Half, int... I>
LCR2S_INLINE Vec<T> merge_lanes(Vec<T> x, Vec<T> y, LaneList<I...>) {
  constexpr int other = kLanes<T>;
  return __builtin_shufflevector(x, y, (I / (2 * Half) * 2 * Half + I % Half + I / Half % 2 * other)...) +
         __builtin_shufflevector(x, y, (I / (2 * Half) * 2 * Half + I % Half + I / Half % 2 * other + Half)...);
}
// The sums over the lanes of as many vectors as there are lanes: that of vectors[i] is lane i.
template <class T, int Count = kLanes<T>>
LCR2S_INLINE Vec<T> sum_lanes_of(const Vec<T>* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    constexpr int half = Count / 2;
    Vec<T> merged[half];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      merged[i] = merge_lanes<T, half>(vectors[i], vectors[i + half], typename LanesUpTo<kLanes<T>>::List{});
    return sum_lanes_of<T, half>(merged);
  }
}

// e^x = p 2^n for x in [-88, 89]: returns p and adds n to the bits of kExpMagic, the sum being `shifted`. Cody-Waite
// reduction and a polynomial of degree 6.
constexpr float kExpMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
LCR2S_INLINE Vec<float> exp_reduced(Vec<float> x, Vec<float>& shifted) {
  shifted = x * 1.44269504088896341f + kExpMagic;
  const Vec<float> n = shifted - kExpMagic;
  const Vec<float> r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}
// e^x for every lane. float: below 2 ulp on [-87.3, 88.7]; smaller x gives 0, larger x infinity, NaN stays NaN. double:
// libm.
LCR2S_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  using I = Mask<float>;
  V clamped = x < -88.0f ? broadcast(-88.0f) : x;
  clamped = clamped > 89.0f ? broadcast(89.0f) : clamped;
  V shifted;
  const V p = exp_reduced(clamped, shifted);
  // 2^n in two factors, so that n = 128 does not overflow the exponent field before the product does.
  const I whole = (I)shifted - (I)broadcast(kExpMagic);
  const I half = whole >> 1;
  const V scale_a = (V)((half + 127) << 23);
  const V scale_b = (V)((whole - half + 127) << 23);
  V y = p * scale_a * scale_b;
  y = x < -87.3365448f ? V{} : y;
  return x > 88.7228394f ? broadcast(__builtin_inff()) : y;
}
LCR2S_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
// The same bits for x <= 0, in fewer instructions.
LCR2S_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  constexpr float low = -87.3365448f;
  Vec<float> shifted;
  const Vec<float> p = exp_reduced(x < low ? broadcast(low) : x, shifted);
  // What the shift leaves of the sum's bits is n + 127.
  const Vec<float> y = p * (Vec<float>)(((Mask<float>)shifted + 127) << 23);
  return x < low ? Vec<float>{} : y;
}
LCR2S_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }

}  // namespace lcr2s::cpu::LCR2S_ISA
