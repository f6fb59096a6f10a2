#pragma once

#include <cstdint>

// Sizes and choices of the relation losses, apart from anything that launches.
namespace lcr2s::cuda {

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct RelationShape {
  int64_t rows;
  int64_t columns;
  int64_t student_width;
  int64_t teacher_width;
  int64_t element_bytes;     // of a matrix product's operands
  int64_t arithmetic_bytes;  // of its result
  int64_t workspace_bytes;
  bool need_image;
  bool need_text;
};

struct FrobeniusPlan {
  bool gram;
  // Columns of the student's and of the teacher's part of an operand, and rows of the texts' operand: multiples of 16
  // bytes, the rest zeros, so that the library's products find aligned rows.
  int64_t student_columns;
  int64_t teacher_columns;
  int64_t text_rows;
  // Rows of a slab of differences in the direct form.
  int64_t slab;

  int64_t width() const { return student_columns + teacher_columns; }
};

constexpr int64_t kSlabRows = 128;

// Rows of a slab whose rows take `row_bytes`: whole tiles within the budget, one at least.
inline int64_t slab_rows(int64_t rows, int64_t row_bytes, int64_t workspace_bytes) {
  const int64_t fitting = workspace_bytes / row_bytes / kSlabRows * kSlabRows;
  const int64_t slab = fitting > kSlabRows ? fitting : kSlabRows;
  return slab < rows ? slab : rows;
}

// Gram matrices cost O((B + N) w^2), the relations themselves O(B N w).
inline FrobeniusPlan plan_frobenius(const RelationShape& shape) {
  const int64_t pack = 16 / shape.element_bytes;
  FrobeniusPlan plan{};
  plan.student_columns = round_up(shape.student_width, pack);
  plan.teacher_columns = round_up(shape.teacher_width, pack);
  plan.text_rows = round_up(shape.columns, pack);
  const auto number = [](int64_t x) { return static_cast<double>(x); };
  const double width = number(plan.width());
  const double image = shape.need_image ? number(shape.rows) : 0;
  const double text = shape.need_text ? number(shape.columns) : 0;
  const double out = number(plan.student_columns);
  const double pairs = number(shape.rows) * number(shape.columns);
  const double direct = pairs * (width + out * ((shape.need_image ? 1 : 0) + (shape.need_text ? 1 : 0)));
  const double gram = number(shape.rows + shape.columns) * width * width + (image + text) * width * out;
  plan.gram = gram < direct;
  const int64_t copy_bytes = shape.element_bytes < shape.arithmetic_bytes ? shape.element_bytes : 0;
  plan.slab = slab_rows(shape.rows, plan.text_rows * (shape.arithmetic_bytes + copy_bytes), shape.workspace_bytes);
  return plan;
}

}  // namespace lcr2s::cuda
