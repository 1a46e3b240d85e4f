// Plain C++: any machine, and what the other sets are compared with.
#include "simd/scalar.h"

#include "isa/kernels_body.h"

KBIT_DEFINE_KERNELS(scalar)
