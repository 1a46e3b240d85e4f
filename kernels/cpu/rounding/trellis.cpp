#include "rounding/trellis.h"

#include <cmath>
#include <stdexcept>

namespace kbit {

TrellisCode::TrellisCode(int bits, bool half, int window, const float* numbers)
    : bits(bits), half(half), window(window) {
  if (bits < 2 || bits + half > 6) throw std::invalid_argument("a trellis has 2 to 6 bits a number");
  if (window < 2 * bits + half || window < bits + half + 5 || window > 16) {
    throw std::invalid_argument("windows have up to 16 bits, at least twice those of a number and 5 more");
  }
  const std::size_t count = std::size_t(1) << window;
  values.resize(count + 32);
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(numbers[i])) throw std::invalid_argument("values must be finite");
    const float scaled = std::fmin(std::fmax(numbers[i] * kTrellisUnit, -32767.0f), 32767.0f);
    values[i] = static_cast<std::uint16_t>(static_cast<std::int16_t>(std::rint(scaled)));
  }
}

}  // namespace kbit
