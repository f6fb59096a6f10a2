#pragma once

#include <vector>

#include "../cpu/features.h"
#include "common.h"

// Feature rows and temporary memory, handed from tensors to the kernels of csrc/cpu.
namespace lcr2s {

// Temporary memory of one operator call, from torch's allocator.
class Workspace {
 public:
  cpu::Memory memory() {
    return {[](int64_t bytes, void* context) -> void* {
              auto& blocks = static_cast<Workspace*>(context)->blocks_;
              blocks.push_back(torch::stable::empty({bytes}, ScalarType::Byte));
              return blocks.back().mutable_data_ptr();
            },
            this};
  }

 private:
  std::vector<Tensor> blocks_;
};

// (rows, width) features on the CPU, both at least 1; copied only where a row is not contiguous.
class FeatureRows {
 public:
  FeatureRows(const char* op, const char* name, const Tensor& tensor) : tensor_(tensor) {
    check_cpu(op, name, tensor);
    check_dim(op, name, tensor, 2);
    check_floating(op, name, tensor);
    if (tensor.size(0) == 0 || tensor.size(1) == 0) fail(op, "`", name, "` must not be empty, got ", shape_of(tensor));
    if (tensor.stride(1) != 1) tensor_ = torch::stable::contiguous(tensor);
  }

  const Tensor& tensor() const { return tensor_; }
  bool wide() const { return tensor_.scalar_type() == ScalarType::Double; }

  cpu::Features view() const {
    return {tensor_.const_data_ptr(), dtype(), tensor_.size(0), tensor_.size(1), tensor_.stride(0)};
  }

 private:
  DType dtype() const {
    switch (tensor_.scalar_type()) {
      case ScalarType::Double:
        return DType::float64;
      case ScalarType::BFloat16:
        return DType::bfloat16;
      case ScalarType::Half:
        return DType::float16;
      default:
        return DType::float32;
    }
  }

  Tensor tensor_;
};

}  // namespace lcr2s
