#pragma once

#include "loss_common.h"
#include "relation.h"

// Kernels of the Frobenius relation loss: everything around the library's matrix products.
namespace lcr2s::cuda {

// Products that one block adds up.
constexpr int64_t kFrobeniusChunk = 8192;

// A row of the operand and, where wanted, of the unit rows. One warp a row.
template <class T>
__global__ void __launch_bounds__(kRelationThreads, 4)
    relation_operand_kernel(const __grid_constant__ RelationOperandArgs args) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kRelationThreads / kWarp) + warp_index();
  const bool image = item < args.sides[0].rows;
  const RelationSide& side = args.sides[image ? 0 : 1];
  const int64_t row = image ? item : item - args.sides[0].rows;
  if (row >= side.rows) return;
  const int lane = lane_index();
  const int64_t width = args.student_columns + args.teacher_columns;
  T* out = static_cast<T*>(side.operand) + row * width;
  if (row >= side.student.rows) {
    for (int64_t j = lane; j < width; j += kWarp) out[j] = static_cast<T>(0);
    return;
  }
  const double student = inverse_norm(side.student, row, lane);
  const double teacher = inverse_norm(side.teacher, row, lane);
  T* unit = side.unit == nullptr ? nullptr : static_cast<T*>(side.unit) + row * args.student_columns;
  // The difference takes the place of the image's student and of the text's teacher.
  const bool student_difference = args.difference && image;
  const bool teacher_difference = args.difference && !image;
#pragma unroll 2
  for (int64_t j = lane; j < args.student_columns; j += kWarp) {
    // Rounded before they are subtracted, not fused: equal rows give exact zeros.
    const double v = multiply_rounded(element_or_zero(side.student, row, j), student);
    const double e = student_difference ? multiply_rounded(element_or_zero(side.teacher, row, j), teacher) : 0;
    out[j] = static_cast<T>(v - e);
    if (unit != nullptr) unit[j] = static_cast<T>(v);
  }
  out += args.student_columns;
#pragma unroll 2
  for (int64_t j = lane; j < args.teacher_columns; j += kWarp) {
    const double e = multiply_rounded(element_or_zero(side.teacher, row, j), teacher);
    const double v = teacher_difference ? multiply_rounded(element_or_zero(side.student, row, j), student) : 0;
    out[j] = static_cast<T>(image ? e : v - e);
  }
}

// Block b's share of sum_i a_i b_i.
template <class T>
__global__ void __launch_bounds__(kRelationThreads) relation_dot_kernel(const __grid_constant__ RelationDotArgs args) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kFrobeniusChunk;
  const int64_t end = begin + kFrobeniusChunk < args.count ? begin + kFrobeniusChunk : args.count;
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kRelationThreads)
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) args.partials[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_fold_kernel(const __grid_constant__ RelationFoldArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRelationThreads + threadIdx.x;
  if (i >= args.width * args.columns) return;
  const T* at = static_cast<const T*>(args.gram) + i / args.columns * args.width + i % args.columns;
  static_cast<T*>(args.out)[i] = at[0] + at[args.columns];
}

}  // namespace lcr2s::cuda
