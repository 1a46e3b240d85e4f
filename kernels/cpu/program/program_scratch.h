// What a program keeps beside its buffers: the rows of x as the matmuls want them, and one member's scratch memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program/program.h"

namespace kbit {

// Up to this many numbers are normalised and quantized by every member for itself: that takes less than waiting for the
// others after sharing the work (docs/measurements.md).
constexpr std::int64_t kRedundantInput = 4096;

// Results of a piece that do not go straight to their place: 64 KB of floats, twice for gate and up.
constexpr std::int64_t kStaging = 16 << 10;

// Features of a convolution that one member takes at a time.
constexpr std::int64_t kConvolved = 256;

// Columns in whole tiles.
constexpr std::int64_t padded(std::int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns * kTileColumns; }

// The forms that x is kept in: with segments of 64, 32 and 16 columns; and rotated, with segments of 64.
constexpr int kForms = 4, kRotated = 3;
inline int segment_of(int form) { return form == kRotated ? 64 : 64 >> form; }

// The form that a matrix wants.
inline int form_of(const Matrix& w) {
  if (w.mixed) return kRotated;
  return w.bits == 0 || w.segment == 64 ? 0 : w.segment == 32 ? 1 : 2;
}

// Marks the forms in which a matmul with codes wants its input.
inline void mark_forms(const MatmulInstruction& m, bool used[kForms]) {
  for (const Weights& w : m.weights)
    if (w->matrix().bits) used[form_of(w->matrix())] = true;
}

struct Program::Inputs {
  // int8 values of rows, or of what rounding them left (see kSpike).
  struct Rounded {
    AlignedBytes codes, scales, sums;
    void reserve(std::size_t count, std::size_t segment) {
      codes = AlignedBytes(count);
      scales = AlignedBytes(count / segment * 4);
      sums = AlignedBytes(count / segment * 4);
    }
    std::size_t size() const { return codes.size() + scales.size() + sums.size(); }
  };
  std::int64_t rows = 0;
  AlignedBytes floats, bfloats, rest, rotated, rotated_bfloats;
  Rounded main[kForms], fine[kForms];
  std::vector<std::uint8_t> spiky[kForms];  // per row: `fine` counts
  MatmulInput view[kForms], fine_view[kForms];

  // Memory for this many rows, which are so many numbers in all, in the forms that are used.
  void reserve(std::int64_t new_rows, std::int64_t numbers, const bool used[kForms], bool int8, bool use_bfloats) {
    rows = new_rows;
    const auto count = static_cast<std::size_t>(numbers);
    floats = AlignedBytes(count * 4);
    if (used[kRotated]) {
      rotated = AlignedBytes(count * 4);
      if (use_bfloats) rotated_bfloats = AlignedBytes(count * 2);
    }
    for (int slot = 0; slot < kForms; ++slot) {
      if (!used[slot] || !int8) continue;
      main[slot].reserve(count, static_cast<std::size_t>(segment_of(slot)));
      fine[slot].reserve(count, static_cast<std::size_t>(segment_of(slot)));
      spiky[slot].assign(static_cast<std::size_t>(rows), 0);
      rest = AlignedBytes(count * 4);
    }
    if (use_bfloats) bfloats = AlignedBytes(count * 2);
  }
};

struct Program::Scratch {
  AlignedBytes kernel{static_cast<std::size_t>(kMatmulScratch + kTrellisScratch)};
  AlignedBytes first{kStaging * 4}, second{kStaging * 4}, third{kStaging * 4};
  std::unique_ptr<Inputs> inputs = std::make_unique<Inputs>();
};

}  // namespace kbit
