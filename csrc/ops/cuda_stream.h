#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

// The dispatch key of the CUDA operators. In the emulated flavour (docs/emulator.md) the CPU's tensors run them.
#ifdef LCR2S_EMULATE_CUDA
#define LCR2S_CUDA_KEY CPU
#else
#define LCR2S_CUDA_KEY CUDA

// Weak: a CPU-only torch lacks it, and the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace lcr2s {

// Makes the device of `tensor` current while it lives, and holds torch's current stream on it.
class CudaScope {
 public:
#ifdef LCR2S_EMULATE_CUDA
  CudaScope(const char*, const Tensor&) {}
#else
  CudaScope(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  void* stream() const { return stream_; }

 private:
#ifndef LCR2S_EMULATE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace lcr2s
