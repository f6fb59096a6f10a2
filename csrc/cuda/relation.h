#pragma once

#include "../cpu/features.h"

// Kernels of the relation losses. Each launches on `stream`, which belongs to the current device, and returns null or
// what CUDA has to say against the launch. `element` is the type of the operands of matrix products, the arithmetic's
// type is double for float64 and float otherwise.
namespace lcr2s::cuda {

using cpu::Features;

// dL/d(unit row) products of a matrix product, taken through the normalisation:
//   out = factor * |row|^-1 * (g - (g . unit) unit)
struct RelationProjectSide {
  Features features;
  const void* product;  // rows x product_stride of the arithmetic's type, null: nothing to do
  int64_t product_stride;
  void* out;  // rows x width of the arithmetic's type
};

struct RelationProjectArgs {
  bool wide;
  RelationProjectSide sides[2];
  double factor;
  const void* multiplier;  // one more factor, on the device, of the arithmetic's type; null for 1
};
const char* relation_project(const RelationProjectArgs& args, void* stream);

// loss = factor * sum of partials
struct RelationTotalArgs {
  bool wide;
  const double* partials;
  int64_t count;
  double factor;
  void* loss;
};
const char* relation_total(const RelationTotalArgs& args, void* stream);

// sum += part
struct RelationAccumulateArgs {
  bool wide;
  void* sum;
  const void* part;
  int64_t count;
};
const char* relation_accumulate(const RelationAccumulateArgs& args, void* stream);

// ---- Frobenius: R_student - R_teacher = U R' for operands U of the images and R of the texts (csrc/cpu/relation.cpp).

struct RelationSide {
  Features student;
  Features teacher;
  void* operand;  // rows x (student_columns + teacher_columns)
  void* unit;     // the student's unit rows, rows x student_columns; null where not wanted
  int64_t rows;   // of the operand; those beyond the features are zeros
};

// Columns beyond a width are zero.
struct RelationOperandArgs {
  DType element;
  RelationSide sides[2];  // images, texts
  int64_t student_columns;
  int64_t teacher_columns;
  bool difference;  // the widths agree: U = [V - E, E], R = [T, T - F]; else U = [V, E], R = [T, -F]
};
const char* relation_operands(const RelationOperandArgs& args, void* stream);

// Partial sums of a . b, one for each block; relation_dot_blocks(count) of them.
struct RelationDotArgs {
  DType element;
  const void* a;  // of the arithmetic's type
  const void* b;
  int64_t count;
  void* copy;  // a as elements, null where not wanted
  double* partials;
};
int64_t relation_dot_blocks(int64_t count);
const char* relation_dot(const RelationDotArgs& args, void* stream);

// Columns [0, columns) of a width x width Gram matrix, plus the next ones where `fold`, as elements.
struct RelationCoefficientsArgs {
  DType element;
  const void* gram;
  int64_t width;
  int64_t columns;
  bool fold;
  void* out;
};
const char* relation_coefficients(const RelationCoefficientsArgs& args, void* stream);

}  // namespace lcr2s::cuda
