// x86-64 with AVX2, FMA and F16C (Haswell, Zen, and later).
#include "simd/avx2.h"

#include "isa/kernels_body.h"

KBIT_DEFINE_KERNELS(avx2)
