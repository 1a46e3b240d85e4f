// Coordinate descent on a matrix that is rounded already: scales and codes, one after another, each to the value that
// costs least while all others stay (as in QuantEase, Behdin et al., arXiv 2309.01885, here with both factors).
//
// The cost of an error E = W - What is tr(H_O E H_I E^T), and G = H_O E H_I is its falling slope. A value that grows by
// d changes the cost by d^2 H_O[n][n] H_I[k][k] - 2 d G[n][k], so it is best at What + G / (H_O[n][n] H_I[k][k]): the
// level nearest to that is taken. What 16 rows do to the slopes of all others is the caller's to add up.
#pragma once

#include <cstdint>

#include "rounding/rounding.h"

namespace kbit {

// Up to 16 rows. Strides are in elements.
struct DescentTask {
  const Grid* grid;
  ScaleType scale_type;
  bool asymmetric;                  // a block has an offset too
  bool fixed_scales;                // leave scales and offsets as they are
  std::int64_t rows, columns, block;
  const float* slopes;              // (rows, columns): G before anything is changed
  const float* inputs;              // (columns, columns): H_I, symmetric, its diagonal positive
  const float* outputs;             // (rows, rows): H_O among these rows, likewise
  std::uint8_t* codes;              // (rows, columns), of the grid
  float* scales;                    // (rows, blocks)
  float* offsets;                   // (rows, blocks), or null
  float* change;                    // (rows, columns) out: how much every value grew
  float* scratch;                   // descent_scratch(columns) floats, 64-byte aligned
};

constexpr std::int64_t descent_scratch(std::int64_t columns) { return 5 * kRoundedRows * columns; }

}  // namespace kbit
