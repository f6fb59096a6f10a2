#pragma once

#include "../cpu/features.h"
#include "element.h"
#include "launch.h"
#include "warp.h"

// Feature rows of any dtype, read by one warp a row, and their norms.
namespace lcr2s::cuda {

using cpu::Features;

// The dtype is uniform: a branch, not a template, keeps the kernels few.
__device__ inline double element_at(const Features& features, int64_t row, int64_t column) {
  const int64_t at = row * features.stride + column;
  switch (features.dtype) {
    case DType::float32:
      return static_cast<double>(static_cast<const float*>(features.data)[at]);
    case DType::float64:
      return static_cast<const double*>(features.data)[at];
    case DType::bfloat16:
      return static_cast<double>(to_accumulate(static_cast<const BFloat16*>(features.data)[at]));
    case DType::float16:
      return static_cast<double>(to_accumulate(static_cast<const Half*>(features.data)[at]));
  }
  return 0;
}

__device__ inline double element_or_zero(const Features& features, int64_t row, int64_t column) {
  return column < features.width ? element_at(features, row, column) : 0;
}

// kCount neighbouring ones from `column`, zero beyond the width.
template <int kCount>
__device__ inline void elements_at(const Features& features, int64_t row, int64_t column, double (&out)[kCount]) {
  const auto read = [&](const auto* data) {
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      out[u] = column + u < features.width
                   ? static_cast<double>(to_accumulate(data[row * features.stride + column + u]))
                   : 0.0;
  };
  switch (features.dtype) {
    case DType::float32:
      return read(static_cast<const float*>(features.data));
    case DType::float64:
      return read(static_cast<const double*>(features.data));
    case DType::bfloat16:
      return read(static_cast<const BFloat16*>(features.data));
    case DType::float16:
      return read(static_cast<const Half*>(features.data));
  }
}

// Never fused with an addition: equal factors give equal products.
__device__ inline double multiply_rounded(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

template <class Element>
__device__ Element narrowed(double x) {
  return from_accumulate<Element>(static_cast<Accumulate<Element>>(x));
}

__device__ inline double sum_of_squares(const Features& features, int64_t row, double factor, int lane) {
  double sum = 0;
  for (int64_t j = lane; j < features.width; j += kWarp) {
    const double x = factor * element_at(features, row, j);
    sum += x * x;
  }
  return warp_sum(sum);
}

// 1 / |row|, by one warp; 0 for a zero row, NaN where the row holds NaN or infinity.
__device__ inline double inverse_norm(const Features& features, int64_t row, int lane) {
  constexpr double kTiny = 0x1p-900;
  constexpr double kHuge = 0x1p900;
  double factor = 1;
  double sum = sum_of_squares(features, row, factor, lane);
  if (sum < kTiny || sum > kHuge) {
    // Squares of float64 features may leave the range.
    factor = sum < 1 ? 0x1p500 : 0x1p-500;
    sum = sum_of_squares(features, row, factor, lane);
    if (sum > 0x1p1000) return static_cast<double>(float_of_bits(0x7fc00000u));
  }
  return sum == 0 ? 0.0 : factor * rsqrt(sum);
}

// The power of two that brings a row of this inverse norm to a norm in (256, 512].
LCR2S_HOST_DEVICE int row_exponent(double inverse) { return inverse > 0 ? ilogb(inverse) + 9 : 0; }

}  // namespace lcr2s::cuda
