#include "ref/simd.h"

#include <cstdlib>
#include <cstring>

namespace lemo::ref {

extern const Simd simd_generic;
#ifdef LEMO_SIMD_X86
extern const Simd simd_avx2;
extern const Simd simd_avx512;
#endif

const Simd& simd() {
  static const Simd& chosen = []() -> const Simd& {
#ifdef LEMO_SIMD_X86
    // LEMO_CPU=generic|avx2 lowers the choice, to test other instruction sets on a machine that has more.
    const char* limit = std::getenv("LEMO_CPU");
    const bool generic = limit != nullptr && std::strcmp(limit, "generic") == 0;
    const bool avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
    __builtin_cpu_init();
    if (!generic && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
      return simd_avx512;
    }
    if (!generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return simd_avx2;
#endif
    return simd_generic;
  }();
  return chosen;
}

}  // namespace lemo::ref
