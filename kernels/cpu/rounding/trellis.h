// Trellis codes: the string of bits whose windows stand for numbers nearest to 256 given ones.
//
// A tile's 256 numbers are coded in a ring of 256 k bits (the last is followed by the first). The window of number t is
// the L bits that end at bit (t + 1) k, the earliest the most significant, and `values` says what each window stands for
// (kbit/formats/trellis_code.py). With half a bit more, every second number brings k + 1 bits in place of k: windows end at
// bit (t + 1) k + (t + 1) / 2. Neighbouring windows overlap in L - k bits, which are the states of a trellis; the
// string with the least squared error is its shortest path (Viterbi; tail-biting as in QTIP, Tseng et al., arXiv
// 2406.11235, section 3.3): first a path over some numbers to both sides of the ring's seam, free at its ends, says which
// overlap is best there; then the path over all numbers from that overlap to itself is taken.
//
// Errors may be passed on within the tile, 16 x 16 row by row, so that what is shortest is the sum of squares not of the
// errors E = numbers - values, but of R' E C, R and C upper triangular with ones on the diagonal: what a column's error
// adds to a later one's is its factor in C, and likewise for rows. Along a row every overlap goes by the errors of the path
// that leads to it (per-survivor processing; Raheli, Polydoros and Tzou, IEEE Trans. Commun. 43, 1995). When a row begins,
// all take the rows before it from the best path up to there: those have nearly settled.
//
// Costs are 16 bits wide and saturate; after each step, what all have in common is taken off. The result is the same for
// every instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace kbit {

constexpr int kTrellisTile = 256;  // numbers of a tile

struct TrellisCode {
  int bits;                           // k, 2 to 6
  bool half;                          // and half a bit more
  int window;                         // L, up to 16: no less than two numbers bring, and at least 5 more than one does
  std::vector<std::uint16_t> values;  // 2^L numbers in units of 1 / kTrellisUnit, signed; 32 more that are read but not used

  // values: 2^window of them, of about unit variance. Throws std::invalid_argument.
  TrellisCode(int bits, bool half, int window, const float* values);
};

// Bytes of a tile's string.
constexpr int trellis_bytes(int bits, bool half) { return 16 * (2 * bits + half); }

constexpr float kTrellisUnit = 8192.0f;
// A squared distance is counted in units of 2^16 / (kTrellisUnit 2^doublings)^2: finer where errors are smaller.
constexpr int trellis_doublings(int bits) { return bits <= 3 ? 1 : 2; }
// Numbers to each side of the seam that the first path sees.
constexpr int trellis_seam(int bits) { return 192 / bits < 32 ? 32 : 192 / bits; }  // even

// How errors are passed on in a tile.
struct TrellisFeedback {
  const std::int16_t* columns;  // C, 16 x 16, in units of 2^-15, none of -32768
  const std::int32_t* rows;     // R, 16 x 16, in units of 2^-16
};

struct TrellisTask {
  const TrellisCode* code;
  const float* numbers;   // 256
  std::uint8_t* string;   // trellis_bytes, the first bit in a byte's highest
  std::uint8_t* scratch;  // trellis_scratch(code, feedback) bytes, 64-byte aligned
  TrellisFeedback feedback;  // nulls: none
};

// Of a row of costs, or of what an overlap hears of earlier errors.
inline std::int64_t trellis_row(const TrellisCode& code) { return (std::int64_t(1) << (code.window - code.bits)) + 32; }

// Two rows of costs, and the choices of 256 steps; with feedback a row of numbers, and two of what each column hears.
inline std::int64_t trellis_scratch(const TrellisCode& code, bool feedback) {
  const std::int64_t row = trellis_row(code), rows = feedback ? 2 + 1 + 2 * 16 : 2;
  return 2 * rows * row + kTrellisTile * (row - 32);
}

}  // namespace kbit
