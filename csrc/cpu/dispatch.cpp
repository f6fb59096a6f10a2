#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace lcr2s::cpu {

static Isa detect() {
  Isa best = Isa::portable;
#ifdef LCR2S_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
#ifdef LCR2S_EMULATE_AVX512
    best = Isa::avx512_bf16;
#endif
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("LCR2S_CPU_ISA");
  if (wanted != nullptr) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < best) best = isa;
    }
  }
  return best;
}

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      break;
  }
  return "portable";
}

}  // namespace lcr2s::cpu
