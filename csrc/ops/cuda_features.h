#pragma once

#include <utility>
#include <vector>

#include "cuda_stream.h"
#include "features.h"

// What every csrc/ops/<family>_cuda.cpp shares: arguments on the device, and memory there.
namespace lcr2s {

inline void check_cuda(const char* op, const char* name, const Tensor& tensor) {
#ifdef LCR2S_EMULATE_CUDA
  check_cpu(op, name, tensor);
#else
  check(tensor.is_cuda(), op, "`", name, "` must be on a CUDA device");
#endif
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  check_cuda(op, name, tensor);
  check(tensor.get_device_index() == other.get_device_index(), op, "`", name, "` must be on the device of `",
        other_name, "`");
}

// Uninitialised memory on the device of `tensor`, from torch's allocator.
inline Tensor empty_on_device(const Tensor& tensor, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(tensor, std::move(sizes), dtype);
}

// FeatureRows on a CUDA device.
class CudaFeatureRows : public FeatureRows {
 public:
  CudaFeatureRows(const char* op, const char* name, const Tensor& tensor) : FeatureRows(op, name, tensor, check_cuda) {}
};

}  // namespace lcr2s
