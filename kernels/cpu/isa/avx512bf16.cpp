// x86-64 with AVX-512 as in isa_avx512vnni.cpp and VBMI and BF16 (Sapphire Rapids, Zen 4).
#include "simd/avx512.h"

#include "isa/kernels_body.h"

KBIT_DEFINE_KERNELS(avx512bf16)
