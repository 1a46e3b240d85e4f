// Coordinate descent on a nested matrix (formats/nested.py): every code to the value that costs least, all widths together,
// while all others stay.
//
// The bits of a code say a value at every width w, with an error E_w of its own. What is to fall is the sum of
// a_w tr(H_O E_w H_I E_w^T): with G_w = H_O E_w H_I, values that grow by d_w change it by the sum of
// a_w (d_w^2 H_O[n][n] H_I[k][k] - 2 d_w G_w[n][k]). A code of w + 1 bits begins with one of w, so the best is found from
// the widest width down: of the two codes that go on from one, the better is kept, and the cost of the one is added.
#pragma once

#include <cstdint>

#include "rounding/rounding.h"

namespace kbit {

constexpr int kMostWidths = 7;

// Up to 16 rows. Strides are in elements; what there is of every width lies one after another, the narrowest first.
struct NestedDescentTask {
  int widths;                       // how many
  int bits[kMostWidths];            // of each, ascending
  float weights[kMostWidths];       // a_w
  const float* levels[kMostWidths]; // 2^bits values by code
  std::int64_t rows, columns, block;
  std::int64_t slope_stride;        // between widths of `slopes` and `change`
  const float* slopes;              // (widths, rows, columns): G_w before anything is changed
  const float* inputs;              // (columns, columns): H_I, symmetric
  const float* outputs;             // (rows, rows): H_O among these rows
  std::int64_t scale_stride;        // between widths of `scales`
  const float* scales;              // (widths, rows, blocks)
  std::uint8_t* codes;              // (rows, columns), of the widest width
  float* change;                    // (widths, rows, columns) out: how much every value grew
  float* scratch;                   // nested_descent_scratch(columns, widths) floats, 64-byte aligned
};

constexpr std::int64_t nested_descent_scratch(std::int64_t columns, int widths) {
  return 3 * widths * kRoundedRows * columns;
}

}  // namespace kbit
