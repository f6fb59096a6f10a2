#pragma once

#include "parallel.h"

// Every csrc/cpu/<family>.cpp is compiled once per instruction set into a namespace of its own. LCR2S_KERNEL(name,
// Args) in a family's header declares all copies and the function that picks one at run time.
namespace lcr2s::cpu {

// avx512_bf16 has the kernels of avx512, which take products of bfloat16 features in pairs where they find it.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The best instruction set that this processor runs and this library holds; LCR2S_CPU_ISA=portable|avx2|avx512
// lowers it.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace lcr2s::cpu

#define LCR2S_DECLARE_IN(isa, name, Args)                \
  namespace isa {                                        \
  void name(const Args& args, const Parallel& parallel); \
  }

#ifdef LCR2S_X86
#define LCR2S_KERNEL(name, Args)                                 \
  LCR2S_DECLARE_IN(portable, name, Args)                         \
  LCR2S_DECLARE_IN(avx2, name, Args)                             \
  LCR2S_DECLARE_IN(avx512, name, Args)                           \
  inline void name(const Args& args, const Parallel& parallel) { \
    switch (current_isa()) {                                     \
      case Isa::avx512_bf16:                                     \
      case Isa::avx512:                                          \
        return avx512::name(args, parallel);                     \
      case Isa::avx2:                                            \
        return avx2::name(args, parallel);                       \
      case Isa::portable:                                        \
        return portable::name(args, parallel);                   \
    }                                                            \
  }
#else
#define LCR2S_KERNEL(name, Args)         \
  LCR2S_DECLARE_IN(portable, name, Args) \
  inline void name(const Args& args, const Parallel& parallel) { portable::name(args, parallel); }
#endif
