// AArch64 with the dot product and int8 matrix products (Armv8.6 and later).
#include "simd/neon.h"

#include "isa/kernels_body.h"
#include "matmul/matmul_i8mm.h"

KBIT_DEFINE_KERNELS_WITH(i8mm, matmul_int8_i8mm)
