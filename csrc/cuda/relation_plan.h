#pragma once

#include <cstdint>
#include <initializer_list>

#include "relation.h"
#include "scaled_rows.h"

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
  plan.slab = slab_rows(shape.rows, plan.text_rows * shape.arithmetic_bytes, shape.workspace_bytes);
  return plan;
}

// One model's places in the workspace.
struct KlModelPlan {
  bool keep;  // all its cosines, from the first pass for the second
  int64_t kept_bytes;
  int64_t image_panels;
  int64_t text_panels;
  int64_t image_factor;
  int64_t text_factor;
  int64_t row_parts;
  int64_t column_parts;
  int64_t running;
};

struct KlPlan {
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t padded_rows;
  int64_t padded_columns;
  // Row tiles of a slab of the first pass and of the second.
  int64_t sums_tiles;
  int64_t slopes_tiles;
  // Columns of the student's operands, rows of the texts' operand and columns of dL/dcosine: multiples of 16 bytes.
  int64_t operand_stride;
  int64_t block_stride;
  KlModelPlan models[2];
  int64_t row_lines;
  int64_t column_lines;
  int64_t partials;
  int64_t totals;
  int64_t bytes;

  int64_t sums_slabs() const { return ceil_div(row_tiles, sums_tiles); }
};

// Writing a cosine and reading it again moves twice its bytes; forming it again costs 2 width FLOPs, in 2-byte types at
// about 150 FLOPs in the time of a byte, in others at about 12: an estimate from data sheets.
inline bool keeping_pays(int64_t width, int64_t element_bytes, int64_t arithmetic_bytes) {
  const int64_t flops_per_byte = element_bytes == 2 ? 150 : 12;
  return 2 * width >= 2 * arithmetic_bytes * flops_per_byte;
}

inline KlPlan plan_kl(const RelationShape& shape) {
  const int64_t pack = 16 / shape.element_bytes;
  const bool gradient = shape.need_image || shape.need_text;
  KlPlan plan{};
  plan.row_tiles = panel_row_tiles(shape.rows);
  plan.column_tiles = ceil_div(shape.columns, kKlColumns);
  plan.padded_rows = padded_rows(shape.rows);
  plan.padded_columns = padded_rows(shape.columns);
  plan.operand_stride = round_up(shape.student_width, pack);
  plan.block_stride = round_up(shape.columns, pack);

  // A half of the budget for dL/dcosine, a quarter for sums; what dL/dcosine leaves may keep cosines, the costlier
  // model's first.
  const auto tiles_within = [&](int64_t tile_bytes, int64_t bytes) {
    const int64_t fitting = bytes / tile_bytes;
    return fitting < 1 ? 1 : fitting < plan.row_tiles ? fitting : plan.row_tiles;
  };
  const int64_t sum_bytes = 2 * shape.arithmetic_bytes;
  plan.sums_tiles =
      tiles_within(2 * sum_bytes * (plan.column_tiles * kPanelRows + plan.padded_columns), shape.workspace_bytes / 4);
  const int64_t block_bytes = kPanelRows * plan.block_stride * shape.element_bytes;
  plan.slopes_tiles = gradient ? tiles_within(block_bytes, shape.workspace_bytes / 2) : plan.row_tiles;
  int64_t left = shape.workspace_bytes / 4 * 3 - (gradient ? plan.slopes_tiles * block_bytes : 0);
  const int64_t widths[2] = {shape.student_width, shape.teacher_width};
  const int64_t kept_bytes = plan.row_tiles * plan.column_tiles * kPanelRows * kKlColumns * shape.arithmetic_bytes;
  const int costlier = widths[1] >= widths[0] ? 1 : 0;
  for (const int model : {costlier, 1 - costlier}) {
    KlModelPlan& of = plan.models[model];
    of.keep = kept_bytes <= left && keeping_pays(widths[model], shape.element_bytes, shape.arithmetic_bytes);
    if (!of.keep) continue;
    of.kept_bytes = kept_bytes;
    left -= kept_bytes;
  }

  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = end;
    end += round_up(bytes, 1024);
    return at;
  };
  const bool slabs = plan.sums_tiles < plan.row_tiles;
  for (int model = 0; model < 2; ++model) {
    KlModelPlan& of = plan.models[model];
    of.image_panels = take(panels_bytes(shape.rows, widths[model], shape.element_bytes));
    of.text_panels = take(panels_bytes(shape.columns, widths[model], shape.element_bytes));
    of.image_factor = take(plan.padded_rows * shape.arithmetic_bytes);
    of.text_factor = take(plan.padded_columns * shape.arithmetic_bytes);
    of.row_parts = take(plan.column_tiles * plan.sums_tiles * kPanelRows * sum_bytes);
    of.column_parts = take(plan.sums_tiles * plan.padded_columns * sum_bytes);
    of.running = take(slabs ? plan.padded_columns * 16 : 0);
  }
  constexpr int64_t kLineNumbers = 5;
  plan.row_lines = take(plan.padded_rows * kLineNumbers * shape.arithmetic_bytes);
  plan.column_lines = take(plan.padded_columns * kLineNumbers * shape.arithmetic_bytes);
  plan.partials = take(plan.slopes_tiles * plan.column_tiles * 3 * 8);
  plan.totals = take(3 * 8);
  plan.bytes = end;
  return plan;
}

}  // namespace lcr2s::cuda
