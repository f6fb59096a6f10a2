#pragma once

#include <cstddef>

// Stacks that take turns on one thread of the system, switched without a system call.
namespace lcr2s::emulation {

struct Fiber {
  void* context = nullptr;     // where it was left
  char* stack = nullptr;       // null for the fiber that the system started
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Maps a stack (with a page below that nobody may touch).
void create(Fiber& fiber);
void destroy(Fiber& fiber);
// The next switch to `fiber` calls entry(), which never returns: it ends with leave().
void prepare(Fiber& fiber, void (*entry)());
// The first thing that entry() does.
void entered();
// From the running fiber, `from`, to `to`; comes back when somebody switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);
[[noreturn]] void leave(Fiber& from, Fiber& to);

}  // namespace lcr2s::emulation
