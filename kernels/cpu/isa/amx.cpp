// AMX tiles for int8 and bfloat16 (Sapphire Rapids), with the instruction sets of avx512bf16.cpp, whose kernels the set
// has for all else.
#include "simd/avx512.h"

#include "matmul/matmul_amx.h"

KBIT_DEFINE_TILE_PRODUCTS(amx, avx512bf16)
