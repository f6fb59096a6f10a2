#pragma once

#include <torch/csrc/stable/ops.h>

#include "common.h"

// Matrix products of the vendor's library, in torch's settings (TF32 only where the user allows it).
namespace lcr2s {

// out = a b. Half operands give a float32 `out`, accumulated in float32. Only overloads that write to `out` are called:
// autocast has rules for the others and would round float32 operands.
inline void multiply_into(Tensor out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const ScalarType dtype = a.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
#ifdef LCR2S_EMULATE_CUDA
  if (half) return multiply_into(out, torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float));
#else
  if (half) {
    std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    return;
  }
#endif
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Rows or columns [begin, begin + count) of a matrix.
inline Tensor part_of(Tensor matrix, int64_t axis, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, axis, begin, count);
}

}  // namespace lcr2s
