// x86-64 with AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake).
#include "simd/avx512.h"

#include "isa/kernels_body.h"

KBIT_DEFINE_KERNELS(avx512vnni)
