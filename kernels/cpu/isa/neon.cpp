// AArch64 with the dot product (Armv8.2 and later).
#include "simd/neon.h"

#include "isa/kernels_body.h"

KBIT_DEFINE_KERNELS(neon)
