#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

// Weak: a CPU-only torch lacks it, and the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace lcr2s {

// Makes the device of `tensor` current while it lives, and holds torch's current stream on it.
class CudaScope {
 public:
  CudaScope(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace lcr2s
