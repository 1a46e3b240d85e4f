// The levels of a codebook as the int8 numbers that integer products take.
#include <algorithm>
#include <cmath>
#include <span>

#include "codecs/matrix_storage.h"

namespace kbit {
namespace {

// From this width on, a codebook that is not of whole steps is multiplied in two digits: rounding it to int8 (an error
// of up to 1/254 of the largest level) would add noticeably to the format's own squared error (docs/measurements.md).
constexpr int kTwoDigitBits = 6;

}  // namespace

// Finds integers for the codebook's levels. Where all levels are whole steps of one size (the integer types) the result
// is exact; otherwise the scale with the least squared rounding error is taken.
void MatrixStorage::choose_levels() {
  Matrix& m = matrix_;
  const std::size_t count = codebook_size();
  const std::span<const float> levels(codebook_.data(), count);
  float peak = 0.0f;
  for (float level : levels) peak = std::max(peak, std::fabs(level));
  high_.assign(count, 0);
  low_.assign(count, 0);
  m.high = high_.data();
  m.low = low_.data();
  if (peak == 0.0f) return;
  double best = -1.0;
  double chosen = 127.0;
  for (int steps = 1; steps <= 128; ++steps) {  // whole steps of peak / steps
    double error = 0.0;
    bool fits = true;
    for (float level : levels) {
      const double scaled = static_cast<double>(level) / peak * steps;
      fits = fits && std::round(scaled) <= 127.0;
      error += (scaled - std::round(scaled)) * (scaled - std::round(scaled));
    }
    error /= static_cast<double>(steps) * steps;  // in units of the peak
    if (fits && (best < 0.0 || error < best * (1.0 - 1e-9))) {
      best = error;
      chosen = steps;
    }
  }
  // A relative error of 1e-6 per level is float32's own rounding of the codebook.
  const bool exact = best <= 1e-12 * static_cast<double>(count);
  m.two_digits = m.bits >= kTwoDigitBits && !exact;
  if (m.two_digits) chosen = 126.0;  // leaves room for the low digit
  m.level_scale = static_cast<float>(peak / chosen);
  m.direct = m.bits == 8 && exact;
  m.plain = m.bits < 8 && exact;
  for (std::size_t c = 0; c < count; ++c) {
    const double scaled = static_cast<double>(codebook_[c]) / peak * chosen;
    const double whole = std::round(scaled);
    high_[c] = static_cast<std::int8_t>(whole);
    if (m.two_digits) low_[c] = static_cast<std::int8_t>(std::round((scaled - whole) * kLowSteps));
    m.plain = m.plain && static_cast<int>(whole) == high_[0] + static_cast<int>(c);
    m.direct = m.direct && (c == 0 || static_cast<int>(whole) == static_cast<int>(c) - 128);
  }
  m.zero = -high_[0];
}

}  // namespace kbit
