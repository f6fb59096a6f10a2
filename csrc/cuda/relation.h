#pragma once

#include "../cpu/features.h"
#include "panel.h"

// Kernels of the relation losses. Each launches on `stream`, which belongs to the current device, and returns null or
// what CUDA has to say against the launch. `element` is the type of the operands of matrix products, the arithmetic's
// type is double for float64 and float otherwise.
namespace lcr2s::cuda {

using cpu::Features;

// dL/d(unit row) products of a matrix product, taken through the normalisation:
//   out = factor * |row|^-1 * (g - (g . unit) unit)
// Where the products are `scaled` they are those of scaled rows with factors of both sides in the slopes
// (scaled_rows.h), less by the row's own factor.
struct RelationProjectSide {
  Features features;
  const void* product;  // rows x product_stride of the arithmetic's type, null: nothing to do
  int64_t product_stride;
  void* out;  // rows x width of the arithmetic's type
};

struct RelationProjectArgs {
  bool wide;
  bool scaled;
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

constexpr int kRelationThreads = 256;

// ---- Frobenius: R_student - R_teacher = U R' for operands U of the images and R of the texts
// (csrc/cpu/relation_frobenius.cpp). All of the arithmetic's type: rounded to bfloat16 or float16, unit rows and
// differences lose too much.

struct RelationSide {
  Features student;
  Features teacher;
  void* operand;  // rows x (student_columns + teacher_columns)
  void* unit;     // the student's unit rows, rows x student_columns; null where not wanted
  int64_t rows;   // of the operand; those beyond the features are zeros
};

// Columns beyond a width are zero.
struct RelationOperandArgs {
  bool wide;
  RelationSide sides[2];  // images, texts
  int64_t student_columns;
  int64_t teacher_columns;
  bool difference;  // the widths agree: U = [V - E, E], R = [T, T - F]; else U = [V, E], R = [T, -F]
};
const char* relation_operands(const RelationOperandArgs& args, void* stream);

// Partial sums of a . b, one for each block; relation_dot_blocks(count) of them.
struct RelationDotArgs {
  bool wide;
  const void* a;
  const void* b;
  int64_t count;
  double* partials;
};
int64_t relation_dot_blocks(int64_t count);
const char* relation_dot(const RelationDotArgs& args, void* stream);

// Columns [0, columns) of a width x width Gram matrix plus the next `columns` ones.
struct RelationFoldArgs {
  bool wide;
  const void* gram;
  int64_t width;
  int64_t columns;
  void* out;
};
const char* relation_fold(const RelationFoldArgs& args, void* stream);

// ---- Kullback-Leibler

// Panels and factors of scaled rows (scaled_rows.h), and what belongs to one model's cosines.
struct RelationKlModel {
  Panels image;
  Panels text;
  const void* image_factor;
  const void* text_factor;
  const void* scale;  // one number of the arithmetic's type, on the device
  void* kept;         // all tiles of cosines from the first pass for the second; null: formed twice
  // Sums of exponentials of a slab, (shift, sum) each: rows by column tile, columns by row tile.
  void* row_parts;
  void* column_parts;
};

// Tiles are kPanelRows x kKlColumns; a slab is rows [kPanelRows first_row_tile, + kPanelRows row_tiles).
constexpr int kKlColumns = 64;

struct RelationKlSums {
  DType element;
  RelationKlModel models[2];  // student, teacher
  int64_t rows;
  int64_t columns;
  int64_t first_row_tile;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t row_parts_stride;
  int64_t column_parts_stride;
};
const char* relation_kl_sums(const RelationKlSums& args, void* stream);

struct RelationKlSide {
  int64_t padded;  // lines, rows or columns
  int64_t part_count;
  int64_t part_stride;
  const void* parts[2];
  void* running[2];  // (shift, sum) as double, merged over slabs; null where one slab is all
  void* lines;       // KlLine (relation_math.h) of each; null: not yet
};
struct RelationKlLines {
  bool wide;
  bool first;
  RelationKlSide sides[2];  // rows of the slab, columns
};
const char* relation_kl_lines(const RelationKlLines& args, void* stream);

struct RelationKlSlopes {
  DType element;
  RelationKlModel models[2];
  int64_t rows;
  int64_t columns;
  int64_t first_row_tile;
  int64_t row_tiles;
  int64_t column_tiles;
  const void* row_lines;
  const void* column_lines;
  double row_weight;
  double column_weight;
  // dL/dcosine times the factors of row and column times block_scale, elements; null: not wanted. Columns up to
  // block_stride are written.
  void* block;
  int64_t block_stride;
  double block_scale;
  double* partials;  // three a tile: loss of rows, loss of columns, dL/dscale
};
const char* relation_kl_slopes(const RelationKlSlopes& args, void* stream);

struct RelationKlTotal {
  bool wide;
  bool first;
  bool last;
  const double* partials;
  int64_t count;
  double* totals;  // three, kept from slab to slab
  double row_weight;
  double column_weight;
  void* loss;
  void* grad_scale;  // null: not wanted
};
const char* relation_kl_total(const RelationKlTotal& args, void* stream);

}  // namespace lcr2s::cuda
