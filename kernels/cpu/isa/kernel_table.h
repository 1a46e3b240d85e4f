// Which instruction sets are compiled in: all, or those that KBIT_KERNEL_SETS (CMakeLists.txt) names.
#pragma once

#include "isa/kernels.h"

namespace kbit {

// The kernels of a compiled set, whether or not this machine can run it; null if there is none of this name.
const Kernels* find_kernels(const char* set);

}  // namespace kbit
