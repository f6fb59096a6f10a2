#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(LCR2S_PORTABLE_FIBERS)
#define LCR2S_FIBER_JUMP
#include <setjmp.h>
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace lcr2s::emulation {

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

#ifdef __SANITIZE_ADDRESS__
// The stack of the thread that the system started, learnt at the first switch away from it.
thread_local const void* system_stack = nullptr;
thread_local size_t system_stack_bytes = 0;
thread_local Fiber* arriving = nullptr;
thread_local bool from_system = false;

void announce(Fiber& from, Fiber& to, bool ends) {
  arriving = &to;
  from_system = from.stack == nullptr;
  const void* bottom = to.stack ? to.stack + page_bytes() : system_stack;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, bottom,
                                 to.stack ? kStackBytes : system_stack_bytes);
}
void arrived() {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(arriving->fake_stack, &bottom, &bytes);
  if (from_system) {
    system_stack = bottom;
    system_stack_bytes = bytes;
  }
}
#else
void announce(Fiber&, Fiber&, bool) {}
void arrived() {}
#endif

}  // namespace

#ifndef LCR2S_FIBER_JUMP

// Saves the registers that a call preserves on the running stack, its top in *from, and goes on where `to` was left.
extern "C" void lcr2s_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden lcr2s_switch_stack
.globl lcr2s_switch_stack
.type lcr2s_switch_stack, @function
lcr2s_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lcr2s_switch_stack, .-lcr2s_switch_stack
)");

void prepare(Fiber& fiber, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(fiber.stack + page_bytes() + kStackBytes);
  // entry() starts as if called: with a return address on top of a stack aligned to 16 bytes. Below, six registers.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
  fiber.fake_stack = nullptr;
}

void jump(Fiber& from, Fiber& to) { lcr2s_switch_stack(&from.context, to.context); }

#else

namespace {

// makecontext starts a fiber, after which _setjmp and _longjmp switch without the system call that swapcontext makes.
struct Context {
  jmp_buf registers;
  ucontext_t start;
  bool started = true;
};

Context& context_of(Fiber& fiber) {
  if (fiber.context == nullptr) fiber.context = new Context;
  return *static_cast<Context*>(fiber.context);
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  Context& context = context_of(fiber);
  getcontext(&context.start);
  context.start.uc_stack.ss_sp = fiber.stack + page_bytes();
  context.start.uc_stack.ss_size = kStackBytes;
  context.start.uc_link = nullptr;
  makecontext(&context.start, entry, 0);
  context.started = false;
  fiber.fake_stack = nullptr;
}

void jump(Fiber& from, Fiber& to) {
  Context& here = context_of(from);
  Context& there = context_of(to);
  if (_setjmp(here.registers) != 0) return;
  if (there.started) _longjmp(there.registers, 1);
  there.started = true;
  setcontext(&there.start);
}

#endif

void create(Fiber& fiber) {
  void* memory = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
    std::fprintf(stderr, "CUDA emulator: no memory for the stack of one more thread\n");
    std::abort();
  }
  fiber.stack = static_cast<char*>(memory);
}

void entered() { arrived(); }

void switch_fiber(Fiber& from, Fiber& to) {
  announce(from, to, false);
  jump(from, to);
  arrived();
}

void leave(Fiber& from, Fiber& to) {
  announce(from, to, true);
  jump(from, to);
  std::abort();
}

}  // namespace lcr2s::emulation
