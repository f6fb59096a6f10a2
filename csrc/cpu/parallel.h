#pragma once

#include <cstdint>

namespace lcr2s::cpu {

// The kernels' only view of the thread pool: csrc/ops binds it to torch::stable::parallel_for, unit tests may bind it
// to a plain loop. Work is cut into tasks by the shape alone, so that results do not depend on the number of threads.
struct Parallel {
  using Body = void (*)(int64_t task, void* context);
  void (*run)(int64_t tasks, Body body, void* context);

  template <class F>
  void for_each(int64_t tasks, const F& body) const {
    if (tasks <= 0) return;
    if (tasks == 1) {
      body(int64_t{0});
      return;
    }
    run(
        tasks, [](int64_t task, void* context) { (*static_cast<const F*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lcr2s::cpu
