#include "program/context.h"

#include <stdexcept>

#include "isa/isa.h"

namespace kbit {

extern const Kernels kernels_scalar, kernels_amx_emulated;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512vnni, kernels_avx512bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_i8mm;
#endif
#if defined(KBIT_HAS_AMX)
extern const Kernels kernels_amx;
#endif

const Kernels* find_kernels(const std::string& set) {
  const Kernels* all[] = {&kernels_scalar, &kernels_amx_emulated,
#if defined(__x86_64__)
                          &kernels_avx2, &kernels_avx512vnni, &kernels_avx512bf16,
#elif defined(__aarch64__)
                          &kernels_neon, &kernels_i8mm,
#endif
#if defined(KBIT_HAS_AMX)
                          &kernels_amx,
#endif
  };
  for (const Kernels* kernels : all)
    if (set == kernels->name) return kernels;
  return nullptr;
}

Context::Context(const std::string& isa, int threads) {
  if (threads < 1) throw std::invalid_argument("a context needs at least 1 thread");
  const std::string set = choose_instruction_set(isa);
  kernels = find_kernels(set);
  if (kernels == nullptr) throw std::invalid_argument("no kernels were compiled for the instruction set " + set);
  team = std::make_unique<Team>(threads);
}

}  // namespace kbit
