#pragma once

#include <cstdint>

#include "dtype.h"

// What csrc/ops hands to the kernels of support attention: query i attends to the pool rows
// indices[indptr[i] .. indptr[i + 1]). Tensors are (rows, heads, width), dense within a row, with `stride` elements
// from row to row. Statistics (probs and the gradient of the scores) are float, double for float64, (entries, heads).
namespace lcr2s {

struct SupportAttentionShape {
  DType dtype;
  int64_t queries;
  int64_t pool_rows;
  int64_t entries;
  int64_t heads;
  int64_t width;
  int64_t value_width;
  double scale;
  const int64_t* indptr;
  const int64_t* indices;
};

struct Rows {
  const void* data;
  int64_t stride;
};

struct SupportAttentionArgs {
  SupportAttentionShape shape;
  Rows query;
  Rows key;
  Rows value;
  void* probs;
  void* out;
};

struct SupportAttentionBackwardArgs {
  SupportAttentionShape shape;
  const int64_t* entry_rows;
  const int64_t* t_indptr;
  const int64_t* t_entries;
  Rows grad_out;
  Rows query;
  Rows key;
  Rows value;
  const void* probs;
  void* grad_scores;
  // Null where that gradient is not asked for.
  void* grad_query;
  void* grad_key;
  void* grad_value;
};

}  // namespace lcr2s
