#pragma once

namespace lcr2s {

// Element types that the kernels take, as csrc/ops hands them to csrc/cpu and csrc/cuda, which know no torch header.
enum class DType { float32, float64, bfloat16, float16 };

}  // namespace lcr2s
