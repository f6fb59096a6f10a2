#include "common.h"

#include "../cpu/dispatch.h"

// Namespace-wide schemas: what this binary holds, so that Python can say which backends run and why the others cannot.
namespace lcr2s {

static int64_t cpu_isa() { return static_cast<int64_t>(cpu::current_isa()); }

static bool compiled_with_cuda() {
#ifdef LCR2S_WITH_CUDA
  return true;
#else
  return false;
#endif
}

// Whether the CPU's tensors run the CUDA kernels (docs/emulator.md).
static bool emulates_cuda() {
#ifdef LCR2S_EMULATE_CUDA
  return true;
#else
  return false;
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(lcr2s, m) {
  m.def("cpu_isa() -> int");
  m.def("compiled_with_cuda() -> bool");
  m.def("emulates_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lcr2s, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("compiled_with_cuda", TORCH_BOX(&compiled_with_cuda));
  m.impl("emulates_cuda", TORCH_BOX(&emulates_cuda));
}

}  // namespace lcr2s
