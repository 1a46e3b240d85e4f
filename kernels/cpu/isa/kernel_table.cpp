#include "isa/kernel_table.h"

#include <cstring>
#include <vector>

namespace kbit {

// Declared here and not in a header: this is the only place that names them.
extern const Kernels kernels_scalar;
#if defined(KBIT_SET_AMX_EMULATED)
extern const TileProducts tiles_amx_emulated;
#endif
#if defined(KBIT_SET_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(KBIT_SET_AVX512VNNI)
extern const Kernels kernels_avx512vnni;
#endif
#if defined(KBIT_SET_AVX512BF16)
extern const Kernels kernels_avx512bf16;
#endif
#if defined(KBIT_SET_AMX)
extern const TileProducts tiles_amx;
#endif
#if defined(KBIT_SET_NEON)
extern const Kernels kernels_neon;
#endif
#if defined(KBIT_SET_I8MM)
extern const Kernels kernels_i8mm;
#endif

namespace {

// Here and not beside the tiles, as this is compiled for any machine of the architecture.
[[maybe_unused]] Kernels with_tiles(const Kernels& base, const char* name, const TileProducts& tiles) {
  Kernels kernels = base;
  kernels.name = name;
  kernels.matmul_int8 = tiles.matmul_int8;
  kernels.matmul_bf16 = tiles.matmul_bf16;
  return kernels;
}

const std::vector<const Kernels*>& compiled_kernels() {
#if defined(KBIT_SET_AMX_EMULATED)
  static const Kernels amx_emulated = with_tiles(kernels_scalar, "amx-emulated", tiles_amx_emulated);
#endif
#if defined(KBIT_SET_AMX)
  static const Kernels amx = with_tiles(kernels_avx512bf16, "amx", tiles_amx);
#endif
  static const std::vector<const Kernels*> all = {
      &kernels_scalar,
#if defined(KBIT_SET_AMX_EMULATED)
      &amx_emulated,
#endif
#if defined(KBIT_SET_AVX2)
      &kernels_avx2,
#endif
#if defined(KBIT_SET_AVX512VNNI)
      &kernels_avx512vnni,
#endif
#if defined(KBIT_SET_AVX512BF16)
      &kernels_avx512bf16,
#endif
#if defined(KBIT_SET_AMX)
      &amx,
#endif
#if defined(KBIT_SET_NEON)
      &kernels_neon,
#endif
#if defined(KBIT_SET_I8MM)
      &kernels_i8mm,
#endif
  };
  return all;
}

}  // namespace

const Kernels* find_kernels(const char* set) {
  for (const Kernels* kernels : compiled_kernels())
    if (std::strcmp(set, kernels->name) == 0) return kernels;
  return nullptr;
}

}  // namespace kbit
