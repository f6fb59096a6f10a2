#pragma once

#include "cpu/features.h"
#include "cuda/panel.h"

namespace lcr2s::cuda {

// Feature rows divided by their norms, as panels (panel.h) of `element` and, where wanted, as a row-major matrix.
// `element` is the features' dtype or a wider one: float32 for half features, float64 for all.
//
// Norms and quotients are formed in double, as csrc/cpu/unit_rows.h does. The norm, hence the unit row, is 0 for a zero
// row and NaN for a row that holds NaN or infinity.
struct PackArgs {
  cpu::Features features;
  DType element;
  // Keeps the rows as they are.
  bool normalise = true;
  // panels_bytes(rows, width, element_bytes), aligned to 1024 bytes; null for none.
  void* panels = nullptr;
  // Rows of `unit_stride` elements; null for none.
  void* unit = nullptr;
  int64_t unit_stride = 0;
  // One a row, double for float64 elements and float otherwise; null for none.
  void* norms = nullptr;
};

// Launches on `stream`; null, or what is wrong with the arguments or CUDA has to say against the launch.
const char* pack_unit_rows(const PackArgs& args, void* stream);

}  // namespace lcr2s::cuda
