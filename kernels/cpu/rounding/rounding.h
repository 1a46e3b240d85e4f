// Rounding a matrix to the values of a format, where the error of one weight is made good by those that come after it.
//
// The error E = W - What of a layer costs tr(H_O E H_I E^T), H_I and H_O the factors of its Fisher information. With
// H_I = L D L^T (L unit lower triangular), and likewise for the rows, that is a sum of squares of L_O^T E L, each with a
// weight of its own; so, from the last row and column to the first, every weight is rounded after the terms that are
// known by then have been added to it (LDLQ: Chee et al., QuIP, arXiv 2307.13304; both sides: Tseng et al., YAQA,
// arXiv 2505.22988, section 4). What the rows below contribute comes in as `correction`; what the columns to the right
// contribute is computed here, for 16 rows at a time.
#pragma once

#include <cstdint>
#include <vector>

namespace kbit {

enum class ScaleType : std::uint8_t { half, bfloat, single };

// The values that codes stand for, and how the nearest is found: a table says at which border a search begins.
struct Grid {
  std::vector<float> levels;         // ascending, different from each other; filled up with zeros to 256
  std::vector<std::uint8_t> codes;   // of each level
  std::vector<float> borders;        // between a level and the next; a value on it belongs to the lower level; filled up
                                     // to 256 with what nothing exceeds
  std::vector<std::uint8_t> starts;  // of each cell of [-1, 1]: borders below the cell
  int most_in_cell = 0;              // borders in one cell

  Grid(std::vector<float> levels, std::vector<std::uint8_t> codes);
};

constexpr int kRoundedRows = 16;  // rows worked on at once, in the lanes of a vector

// Up to 16 rows. Strides are in elements.
struct RoundTask {
  const Grid* grid;
  ScaleType scale_type;
  bool asymmetric;                  // a block has an offset too
  std::int64_t rows, columns, block;
  const float* weights;             // (rows, columns)
  const float* correction;          // (rows, columns), or null
  const float* feedback;            // (columns, columns): [j][k] = L[k][j], read for k > j; or null: none
  const float* importance;          // (columns): weight of a column's squared error when a scale is chosen
  const float* shares;              // scales that are tried, as shares of what spans the block
  std::int64_t share_count;
  const float* given_scales;        // (rows, blocks), or null: chosen here
  const float* given_offsets;       // likewise, if asymmetric
  const std::int32_t* blocks_of;    // (columns): the block that each belongs to, where they are not in its order; or
                                    // null. Scales are then given.
  std::uint8_t* codes;              // (rows, columns)
  float* scales;                    // (rows, blocks)
  float* offsets;                   // (rows, blocks), or null
  float* residual;                  // (rows, columns), or null: the terms of L_O^T E L
  float* scratch;                   // round_scratch(columns) floats, 64-byte aligned
};

constexpr std::int64_t round_scratch(std::int64_t columns) { return 3 * kRoundedRows * columns; }

}  // namespace kbit
