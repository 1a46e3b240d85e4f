// The products of AMX with the tiles emulated in plain C++, over scalar.cpp's kernels: for tests, on any machine.
#define KBIT_EMULATE_TILES 1
#include "simd/scalar.h"

#include "matmul/matmul_amx.h"

KBIT_DEFINE_TILE_PRODUCTS(amx_emulated, scalar)
