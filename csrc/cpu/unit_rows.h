#pragma once

#include "features.h"
#include "parallel.h"
#include "scalar.h"

// L2 normalisation of feature rows. Norms and quotients are formed in double: squares of float features neither
// overflow nor underflow, and a difference of two unit rows keeps its digits however close they are.
namespace lcr2s::cpu::LCR2S_ISA {

constexpr int64_t kSegment = 256;
// Rows that one task normalises.
constexpr int64_t kUnitRows = 32;

template <class S>
static void widen_typed(const S* source, int count, double* out) {
  if constexpr (sizeof(S) < sizeof(float)) {
    float wide[kSegment];
    int i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) store(wide + i, load_accumulate(source + i));
    for (; i < count; ++i) wide[i] = to_accumulate(source[i]);
    widen_typed(wide, count, out);
  } else {
    int i = 0;
    for (; i + kLanes<double> <= count; i += kLanes<double>) store(out + i, load_double(source + i));
    for (; i < count; ++i) out[i] = static_cast<double>(source[i]);
  }
}

// Elements [begin, begin + count) of a row, count <= kSegment.
static inline void widen(const Features& features, int64_t row, int64_t begin, int count, double* out) {
  const int64_t offset = row * features.stride + begin;
  switch (features.dtype) {
    case DType::float32:
      return widen_typed(static_cast<const float*>(features.data) + offset, count, out);
    case DType::float64:
      return widen_typed(static_cast<const double*>(features.data) + offset, count, out);
    case DType::bfloat16:
      return widen_typed(static_cast<const BFloat16*>(features.data) + offset, count, out);
    case DType::float16:
      return widen_typed(static_cast<const Half*>(features.data) + offset, count, out);
  }
}

LCR2S_INLINE int segment_size(int64_t width, int64_t begin) {
  return static_cast<int>(width - begin < kSegment ? width - begin : kSegment);
}

// Sums in eight lanes, whatever the instruction set: the same bits from all of them.
struct EightSums {
  static constexpr int kVectors = 8 / kLanes<double>;
  Vec<double> sums[kVectors] = {};

  // value(i) is a vector that begins at element i of the next eight.
  template <class F>
  LCR2S_INLINE void add(const F& value) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) sums[u] += value(u * kLanes<double>);
  }
  LCR2S_INLINE double total() const {
    double lanes[8];
    __builtin_memcpy(lanes, sums, sizeof(lanes));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

// Sum of the squares of factor * element.
static inline double sum_of_squares(const Features& features, int64_t row, double factor) {
  EightSums squares;
  double segment[kSegment];
  for (int64_t begin = 0; begin < features.width; begin += kSegment) {
    const int count = segment_size(features.width, begin);
    widen(features, row, begin, count, segment);
    for (int i = count; i % 8 != 0; ++i) segment[i] = 0;
    for (int i = 0; i < count; i += 8)
      squares.add([&](int at) __attribute__((always_inline)) {
        const Vec<double> value = factor * load(segment + i + at);
        return value * value;
      });
  }
  return squares.total();
}

// 1 / |row|; 0 for a zero row, so that its unit row and its gradient are zero. NaN where the row holds NaN or infinity.
static inline double inverse_norm(const Features& features, int64_t row) {
  double factor = 1;
  double sum = sum_of_squares(features, row, factor);
  if (sum < 0x1p-900 || sum > 0x1p900) {
    // Squares of float64 features may leave the range.
    factor = sum < 1 ? 0x1p500 : 0x1p-500;
    sum = sum_of_squares(features, row, factor);
    if (sum > 0x1p1000) return __builtin_nan("");
  }
  return sum == 0 ? 0.0 : factor / __builtin_sqrt(sum);
}

// out[i] = value(i) for `count` elements, value giving a vector of them and readable to whole vectors.
template <class T, class F>
LCR2S_INLINE void write_doubles(int count, T* out, const F& value) {
  int i = 0;
  for (; i + kLanes<double> <= count; i += kLanes<double>) store_double(out + i, value(i));
  if (i < count) {
    T lanes[kLanes<double>];
    store_double(lanes, value(i));
    __builtin_memcpy(out + i, lanes, static_cast<size_t>(count - i) * sizeof(T));
  }
}

// out = factor * row
template <class T>
static void scale_row(const Features& features, int64_t row, double factor, T* out) {
  double segment[kSegment] = {};
  for (int64_t begin = 0; begin < features.width; begin += kSegment) {
    const int count = segment_size(features.width, begin);
    widen(features, row, begin, count, segment);
    write_doubles(count, out + begin, [&](int i) __attribute__((always_inline)) { return factor * load(segment + i); });
  }
}

// The power of two that brings a norm, given its inverse, into [1, 2); 1 for a zero row and for NaN.
LCR2S_INLINE double binary_scale(double inverse) {
  if (!(inverse > 0)) return 1;
  int exponent;
  __builtin_frexp(inverse, &exponent);
  return __builtin_ldexp(1.0, exponent);
}

// out = factor * row in bfloat16, followed by zero where the width is odd.
static inline void scale_row_to_pairs(const Features& features, int64_t row, double factor, BFloat16* out) {
  float values[kSegment];
  double segment[kSegment] = {};
  for (int64_t begin = 0; begin < features.width; begin += kSegment) {
    const int count = segment_size(features.width, begin);
    widen(features, row, begin, count, segment);
    write_doubles(count, values, [&](int i) __attribute__((always_inline)) { return factor * load(segment + i); });
    int i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) store_accumulate(out + begin + i, load(values + i));
    for (; i < count; ++i) out[begin + i] = from_accumulate<BFloat16>(values[i]);
  }
  if (features.width % 2 != 0) out[features.width] = BFloat16{0};
}

// out = factor_a * row of a - factor_b * row of b; equal widths.
template <class T>
static void scale_difference(const Features& a, const Features& b, int64_t row, double factor_a, double factor_b,
                             T* out) {
  double first[kSegment] = {};
  double second[kSegment] = {};
  for (int64_t begin = 0; begin < a.width; begin += kSegment) {
    const int count = segment_size(a.width, begin);
    widen(a, row, begin, count, first);
    widen(b, row, begin, count, second);
    // Rounded before they are subtracted, not fused: equal rows give exact zeros.
    write_doubles(count, out + begin, [&](int i) __attribute__((always_inline)) {
      return rounded<double>(factor_a * load(first + i)) - rounded<double>(factor_b * load(second + i));
    });
  }
}

// Calls body(row) for every row in [begin, end), kUnitRows a task.
template <class F>
static void for_rows(const Parallel& parallel, int64_t begin, int64_t end, const F& body) {
  parallel.for_each(ceil_div(end - begin, kUnitRows), [&](int64_t task) {
    const int64_t first = begin + task * kUnitRows;
    const int64_t last = first + kUnitRows < end ? first + kUnitRows : end;
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

// Unit rows [begin, end) as dense rows of `out`; their inverse norms at inverse[row] unless it is null.
template <class T>
static void unit_rows(const Parallel& parallel, const Features& features, int64_t begin, int64_t end, T* out,
                      double* inverse) {
  for_rows(parallel, begin, end, [&](int64_t row) {
    const double factor = inverse_norm(features, row);
    if (inverse != nullptr) inverse[row] = factor;
    scale_row(features, row, factor, out + (row - begin) * features.width);
  });
}

// Through the normalisation: gradient = factor * inverse * (g - (g . unit) unit) + along_unit * unit, in place.
template <class T>
static void project_row(T* gradient, const T* unit, int64_t width, double factor, double inverse,
                        double along_unit = 0) {
  EightSums sums;
  int64_t at = 0;
  for (; at + 8 <= width; at += 8)
    sums.add([&](int i) __attribute__((always_inline)) {
      return load_double(gradient + at + i) * load_double(unit + at + i);
    });
  double along = sums.total();
  for (; at < width; ++at) along += static_cast<double>(gradient[at]) * static_cast<double>(unit[at]);
  const double scale = factor * inverse;
  const double of_unit = along_unit - scale * along;
  int64_t i = 0;
  for (; i + kLanes<double> <= width; i += kLanes<double>)
    store_double(gradient + i, scale * load_double(gradient + i) + of_unit * load_double(unit + i));
  for (; i < width; ++i)
    gradient[i] = static_cast<T>(scale * static_cast<double>(gradient[i]) + of_unit * static_cast<double>(unit[i]));
}

}  // namespace lcr2s::cpu::LCR2S_ISA
