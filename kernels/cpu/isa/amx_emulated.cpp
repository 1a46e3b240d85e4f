// The AMX kernels over plain C++, the tiles emulated: for tests, on any machine.
#define KBIT_EMULATE_TILES 1
#include "simd/scalar.h"

#include "isa/kernels_body.h"
#include "matmul/matmul_amx.h"

KBIT_DEFINE_KERNELS_WITH(amx_emulated, "amx-emulated", matmul_int8_tiles, matmul_bf16_tiles)
