#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <vector>

#include "../cpu/features.h"
#include "common.h"

// Feature rows and temporary memory, handed from tensors to the kernels.
namespace lcr2s {

inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
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

// For memory on the CPU that is about to be written. Large blocks are often fresh from the system, where touching them
// page by page can take as long as the kernel.
inline void prefer_huge_pages(void* block, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes >= int64_t{4} << 20) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(block);
  static_cast<void>(bytes);
#endif
}

// The tensor itself, an uninitialised result.
inline Tensor prefer_huge_pages(Tensor result) {
  if (result.is_cpu())
    prefer_huge_pages(result.mutable_data_ptr(), result.numel() * static_cast<int64_t>(result.element_size()));
  return result;
}

// Temporary memory of one operator call, from torch's allocator. Small blocks lie in chunks that are large enough for
// huge pages, of which what is not touched costs nothing.
class Workspace {
 public:
  cpu::Memory memory() {
    return {[](int64_t bytes, void* context) { return static_cast<Workspace*>(context)->take(bytes); }, this};
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kChunk = 0;  // every block a tensor of its own, so that writes past its end are seen
#else
  static constexpr int64_t kChunk = int64_t{8} << 20;
#endif

  void* take(int64_t bytes) {
    if (bytes >= kChunk) return allocate(bytes);
    constexpr int64_t alignment = 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    if (end_ - next_ < bytes) {
      // From the first whole huge page on.
      constexpr uintptr_t huge_page = uintptr_t{2} << 20;
      char* chunk = allocate(kChunk + static_cast<int64_t>(huge_page));
      next_ = chunk + (huge_page - reinterpret_cast<uintptr_t>(chunk) % huge_page) % huge_page;
      end_ = next_ + kChunk;
    }
    char* block = next_;
    next_ += bytes;
    return block;
  }

  char* allocate(int64_t bytes) {
    tensors_.push_back(prefer_huge_pages(torch::stable::empty({bytes}, ScalarType::Byte)));
    return static_cast<char*>(tensors_.back().mutable_data_ptr());
  }

  std::vector<Tensor> tensors_;
  char* next_ = nullptr;
  char* end_ = nullptr;
};

// (rows, width) features on one device, the CPU unless said otherwise, both at least 1; copied only where a row is not
// contiguous.
class FeatureRows {
 public:
  using CheckDevice = void (*)(const char* op, const char* name, const Tensor& tensor);

  FeatureRows(const char* op, const char* name, const Tensor& tensor, CheckDevice check_device = check_cpu)
      : tensor_(tensor) {
    check_device(op, name, tensor);
    check_dim(op, name, tensor, 2);
    check_floating(op, name, tensor);
    if (tensor.size(0) == 0 || tensor.size(1) == 0) fail(op, "`", name, "` must not be empty, got ", shape_of(tensor));
    if (tensor.stride(1) != 1) tensor_ = torch::stable::contiguous(tensor);
  }

  const Tensor& tensor() const { return tensor_; }
  bool wide() const { return tensor_.scalar_type() == ScalarType::Double; }

  cpu::Features view() const {
    return {tensor_.const_data_ptr(), dtype_of(tensor_.scalar_type()), tensor_.size(0), tensor_.size(1),
            tensor_.stride(0)};
  }

 private:
  Tensor tensor_;
};

}  // namespace lcr2s
