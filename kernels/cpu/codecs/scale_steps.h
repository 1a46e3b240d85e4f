// Scales as integer steps of a common size: how a matrix whose format has them (GGUF's K types) is found out.
#pragma once

#include <cstdint>

namespace kbit {

// Finds `size` and int8 `steps` with float(steps[i]) * size equal to numbers[i] in every bit, the sign of zeros included.
// Returns false where there are none. Where there are, the greatest size is taken, so the result depends on nothing else.
bool find_steps(const float* numbers, int count, float* size, std::int8_t* steps);

}  // namespace kbit
