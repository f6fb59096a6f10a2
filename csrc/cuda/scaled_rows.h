#pragma once

#include "../cpu/features.h"
#include "panel.h"

// Feature rows as operands that have lost no digit: row i is multiplied by a power of two, 2^e_i, such that its norm
// lies in (256, 512]; float16 then reaches down to 2^-32 of the norm. A factor a row, 1 / |scaled row|, makes unit rows
// of them: a cosine is (product of scaled rows) * factor * other factor.
namespace lcr2s::cuda {

struct ScaledRows {
  cpu::Features features;
  // Row i of everything below is row order[i] of the features; null: row i.
  const int64_t* order;
  // panels_bytes(rows, width, element_bytes) aligned to 1024 bytes.
  void* panels;
  // padded_rows(rows) of the arithmetic's type: 0 for a zero row and beyond the rows, NaN where a row holds NaN or
  // infinity.
  void* factor;
  // operand_rows x operand_stride elements, row-major, zeros beyond rows and width; null: not wanted.
  void* operand;
  int64_t operand_rows;
  int64_t operand_stride;
  // Set to 1 where a row holds NaN or infinity, otherwise left alone; null: not wanted.
  int* not_finite;
};

LCR2S_HOST_DEVICE constexpr int64_t padded_rows(int64_t rows) { return panel_row_tiles(rows) * kPanelRows; }

constexpr int kScaledRowsMost = 4;

// `element` is the features' dtype or a wider one; the arithmetic's type is double for float64 and float otherwise.
struct ScaledRowsArgs {
  DType element;
  int count;
  ScaledRows sides[kScaledRowsMost];
};

// Launches on `stream`; null, or what CUDA has to say against the launch.
const char* scaled_rows(const ScaledRowsArgs& args, void* stream);

}  // namespace lcr2s::cuda
