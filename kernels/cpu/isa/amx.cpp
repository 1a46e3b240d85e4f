// x86-64 as in isa_avx512bf16.cpp, with AMX tiles for int8 and bfloat16 (Sapphire Rapids).
#include "simd/avx512.h"

#include "isa/kernels_body.h"
#include "matmul/matmul_amx.h"

KBIT_DEFINE_KERNELS_WITH(amx, "amx", matmul_int8_tiles, matmul_bf16_tiles)
