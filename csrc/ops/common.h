#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../cpu/parallel.h"

// What every csrc/ops/<family>.cpp shares: argument checks whose messages name the argument, and the thread pool.
namespace lcr2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "lcr2s::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ")";
  return out.str();
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  if (tensor.dim() != dim) fail(op, "`", name, "` must have ", dim, " dimension(s), got shape ", shape_of(tensor));
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, int64_t axis, int64_t size) {
  if (tensor.size(axis) != size)
    fail(op, "`", name, "` must have size ", size, " in dimension ", axis, ", got shape ", shape_of(tensor));
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  check(is_floating(tensor.scalar_type()), op, "`", name, "` must be float32, float64, bfloat16 or float16");
}

inline void check_int64(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Long, op, "`", name, "` must be int64");
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), op, "`", name, "` must be on the CPU");
}

// torch's own thread pool: set_num_threads is honoured and no second OpenMP runtime starts. Threads take tasks in turn,
// so that where another program holds a core the others do its share; which thread runs a task changes no bit.
inline cpu::Parallel torch_parallel() {
  return cpu::Parallel{[](int64_t tasks, cpu::Parallel::Body body, void* context) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, context);
    });
  }};
}

}  // namespace lcr2s
