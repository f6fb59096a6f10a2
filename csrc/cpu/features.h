#pragma once

#include <cstdint>

#include "../dtype.h"

namespace lcr2s::cpu {

// Feature rows in memory, of any dtype: `width` elements each, `stride` elements from row to row.
struct Features {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t width;
  int64_t stride;
};

// Where a kernel gets temporary memory, whose size it alone knows. Blocks are aligned to 64 bytes, uninitialised, and
// live until the operator returns.
struct Memory {
  void* (*allocate)(int64_t bytes, void* context);
  void* context;

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)), context));
  }
};

}  // namespace lcr2s::cpu
