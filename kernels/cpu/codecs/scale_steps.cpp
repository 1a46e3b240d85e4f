#include "codecs/scale_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace kbit {
namespace {

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

bool find_steps(const float* numbers, int count, float* size, std::int8_t* steps) {
  // Every float is an odd integer times a power of two. Multiples of a size by up to 128 have exponents that lie close
  // together, or have no such size.
  constexpr int kMantissaBits = 24, kWidest = 32;
  int lowest = 1 << 20;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(numbers[i])) return false;
    if (numbers[i] != 0.0f) lowest = std::min(lowest, std::ilogb(numbers[i]) + 1 - kMantissaBits);
  }
  std::int64_t common = 0;  // greatest common divisor, in units of 2^lowest
  for (int i = 0; i < count; ++i) {
    if (numbers[i] == 0.0f) continue;
    if (std::ilogb(numbers[i]) + 1 - kMantissaBits - lowest > kWidest) return false;
    const auto whole = static_cast<std::int64_t>(std::ldexp(static_cast<double>(std::fabs(numbers[i])), -lowest));
    if (common == 0 || whole % common != 0) common = std::gcd(common, whole);
  }
  if (common == 0) {  // zeros of both signs
    for (int i = 0; i < count; ++i) steps[i] = std::signbit(numbers[i]) ? -1 : 1;
    *size = 0.0f;
    return true;
  }
  const auto magnitude = static_cast<float>(std::ldexp(static_cast<double>(common), lowest));
  // A negative size: for zeros below zero, and for 128 steps up.
  for (const float candidate : {magnitude, -magnitude}) {
    bool exact = true;
    for (int i = 0; i < count && exact; ++i) {
      const float step = numbers[i] / candidate;
      exact = std::fabs(step) <= 128.0f && step != 128.0f;
      if (!exact) break;
      steps[i] = static_cast<std::int8_t>(step);
      exact = same_bits(static_cast<float>(steps[i]) * candidate, numbers[i]);
    }
    if (exact) {
      *size = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace kbit
