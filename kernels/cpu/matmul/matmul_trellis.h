// x W^T for trellis codes, with x in int8 by segments of 64 columns. Few rows: the bytes of the products are multiplied
// with x as they are, each value of x repeated for the bytes of its weight. More rows: levels are kept in two digits,
// 2^shift high + low, which all rows share. Sums of integers are exact, so that both come to the same bits.
#pragma once

#include "codecs/unpack_trellis.h"
#include "matmul/matmul.h"

namespace {

// Most rows that are multiplied without digits. add_spikes has up to kRowsWithoutScratch rows in the scratch memory.
constexpr int kTrellisDirect = kDirectRows > kbit::kRowsWithoutScratch ? kDirectRows : kbit::kRowsWithoutScratch;

// Columns of x that are repeated at once: with sum4 16 KB a row.
constexpr int64_t kRepeatedColumns = 4096;
// Where they lie in a thread's scratch memory: what comes before may hold rows that are multiplied (add_spikes).
static_assert(kbit::kTrellisScratch >= 4 * kRepeatedColumns * kDirectRows);

// Rows of x with each value as often as its weight has bytes: for every tile of 16 columns, one dword for each vector.
template <Code kCode>
void repeat_columns(const int8_t* codes, int64_t columns, int8_t* out) {
  for (int64_t first = 0; first < columns; first += kTrellisColumns) {
    uint32_t lanes[Trellis<kCode>::kProducts];
    for (int i = 0; i < Trellis<kCode>::kProducts; ++i) {
      const uint32_t low = uint8_t(codes[first + trellis_column<kCode>(i, 0)]);
      const uint32_t high = uint8_t(codes[first + trellis_column<kCode>(i, 2)]);
      lanes[i] = low * 0x0101u | high * 0x01010000u;
    }
    memcpy(out + first / kTrellisColumns * sizeof lanes, lanes, sizeof lanes);
  }
}

// The first sum of a segment: what dot4 leaves out of 4 (or 2) signed bytes of each weight.
template <Code kCode> inline int32_t first_sum(int32_t sum) {
  return (Trellis<kCode>::kRest - Trellis<kCode>::kCopies * kLevelBias) * sum;
}

template <Code kCode, int Halves, int kRows>
void trellis_direct_rows(const MatmulTask& task, int64_t row, int64_t begin, int64_t end, const int8_t* repeated) {
  const Matrix& w = *task.w;
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  constexpr int64_t kBytes = 4 * Trellis<kCode>::kProducts;  // of x, a tile
  const int64_t stride = (end - begin) * 4 * kBytes;         // of a row
  const float* scales[kRows];
  const int32_t* sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    scales[r] = task.x.scales + (row + r) * task.x.segments_stride;
    sums[r] = task.x.sums + (row + r) * task.x.segments_stride;
  }
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * w.tile_bytes();
    float* out = task.out + (row - task.row_begin) * task.out_stride + (panel - task.panel_begin) * 16;
    Floats total[kRows];
    for (int r = 0; r < kRows; ++r) total[r] = begin == 0 ? zero() : load(out + r * task.out_stride);
    const int8_t* x = repeated;
    for (int64_t segment = begin; segment < end; ++segment) {
      for (int line = 0; line < Halves; ++line) prefetch(tile + kPrefetchBytes + 64 * line);
      Ints dot[kRows][kChains];
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kChains; ++c) dot[r][c] = broadcast(c == 0 ? first_sum<kCode>(sums[r][segment]) : 0);
      for (int quarter = 0; quarter < 4; ++quarter, tile += 16 * Halves, x += kBytes) {
        trellis_products<kCode, Halves>(tile, w.window_mask, [&]<int I>(Bytes products) __attribute__((always_inline)) {
          const Bytes bytes = signed_bytes(products);
          for (int r = 0; r < kRows; ++r) {
            Ints& sum = dot[r][I % kChains];
            sum = dot4(sum, bytes, x + r * stride + 4 * I);
          }
        });
      }
      for (int r = 0; r < kRows; ++r) {
        for (int c = 1; c < kChains; ++c) dot[r][0] = add(dot[r][0], dot[r][c]);
        total[r] = fma(to_float(dot[r][0]), broadcast(scales[r][segment]), total[r]);
      }
    }
    const Floats scale = mul(broadcast(trellis_step(kCode)),
                             load_half(static_cast<const uint16_t*>(w.scales) + panel * kbit::kPanelRows));
    for (int r = 0; r < kRows; ++r)
      store(out + r * task.out_stride, end == w.tiles ? mul(total[r], scale) : total[r]);
  }
}

template <Code kCode, int Halves> void trellis_direct(const MatmulTask& task) {
  constexpr int64_t kStretch = kRepeatedColumns / 64;
  auto* repeated = reinterpret_cast<int8_t*>(task.scratch + kbit::kMatmulScratch);
  for_row_tiles<kDirectRows>(task.row_begin, task.row_end, [&](auto size, int64_t row) {
    constexpr int kRows = decltype(size)::value;
    for (int64_t begin = 0; begin < task.w->tiles; begin += kStretch) {
      const int64_t end = begin + kStretch < task.w->tiles ? begin + kStretch : task.w->tiles;
      const int64_t bytes = (end - begin) * 16 * Trellis<kCode>::kProducts;
      for (int r = 0; r < kRows; ++r)
        repeat_columns<kCode>(task.x.codes + (row + r) * task.x.codes_stride + 64 * begin, 64 * (end - begin),
                              repeated + r * bytes);
      trellis_direct_rows<kCode, Halves, kRows>(task, row, begin, end, repeated);
    }
  });
}

// ------------------------------------------------------------------------------------------------- two digits

// Both digits of tiles [begin, end) of a panel, as expand_levels lays levels out: a quad has four columns of 16 rows. The
// high one less 128, plus dot4's bias; the low one as it is.
template <Code kCode, int Halves>
void expand_digits(const Matrix& w, int64_t panel, int64_t begin, int64_t end, uint8_t* high, uint8_t* low) {
  constexpr int kShift = Trellis<kCode>::kDigitShift;
  const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * w.tile_bytes();
  alignas(64) int32_t sums[16 * kTrellisColumns];
  for (int64_t t = 4 * begin; t < 4 * end; ++t, tile += 16 * Halves) {
    trellis_sums<kCode, Halves>(tile, w.window_mask, sums);
    for (int quad = 0; quad < 4; ++quad, high += 64, low += 64) {
      Ints above = broadcast(0), below = broadcast(0);
      repeat<4>([&]<int J>() __attribute__((always_inline)) {
        const Ints sum = load_ints(sums + 16 * (4 * quad + J));
        above = or_bits(above, shift_left<8 * J>(shift_right<kShift>(sum)));
        below = or_bits(below, shift_left<8 * J>(and_bits(sum, (1 << kShift) - 1)));
      });
      store_bytes(high, signed_bytes(as_bytes(above)));
      store_bytes(low, as_bytes(below));
    }
  }
}

template <Code kCode, int kRows>
void digits_tile(const MatmulTask& task, const Int8Stretch& stretch, int64_t row) {
  const Matrix& w = *task.w;
  constexpr int kShift = Trellis<kCode>::kDigitShift;
  constexpr int32_t kRest = (1 << kShift) * 128 - Trellis<kCode>::kZero;  // the level of two digits that are zero
  float* out = task.out + (row - task.row_begin) * task.out_stride + (stretch.panel - task.panel_begin) * 16;
  const int8_t* codes = task.x.codes + row * task.x.codes_stride;
  const float* scales = task.x.scales + row * task.x.segments_stride;
  const int32_t* sums = task.x.sums + row * task.x.segments_stride;
  Floats total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = stretch.tile_begin == 0 ? zero() : load(out + r * task.out_stride);
  const uint8_t *high = stretch.high, *low = stretch.low;
  for (int64_t s = stretch.tile_begin; s < stretch.tile_end; ++s) {
    Ints above[kRows], below[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int32_t sum = sums[r * task.x.segments_stride + s];
      above[r] = broadcast(-kLevelBias * sum);
      below[r] = broadcast((kRest)*sum);
    }
    for (int quad = 0; quad < 16; ++quad, high += 64, low += 64) {
      const Bytes a = load_bytes(high), b = load_bytes(low);
      for (int r = 0; r < kRows; ++r) {
        const int8_t* x = codes + r * task.x.codes_stride + 64 * s + 4 * quad;
        above[r] = dot4(above[r], a, x);
        below[r] = dot4(below[r], b, x);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const Ints sum = add(shift_left<kShift>(above[r]), below[r]);
      total[r] = fma(to_float(sum), broadcast(scales[r * task.x.segments_stride + s]), total[r]);
    }
  }
  const Floats scale = mul(broadcast(trellis_step(kCode)),
                           load_half(static_cast<const uint16_t*>(w.scales) + stretch.panel * kbit::kPanelRows));
  for (int r = 0; r < kRows; ++r)
    store(out + r * task.out_stride, stretch.tile_end == w.tiles ? mul(total[r], scale) : total[r]);
}

template <Code kCode, int Halves> void trellis_buffered(const MatmulTask& task) {
  constexpr int64_t kTiles = kBufferColumns / 64;
  const Matrix& w = *task.w;
  uint8_t* low = task.scratch + kTiles * 1024;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    for (int64_t begin = 0; begin < w.tiles; begin += kTiles) {
      const int64_t end = begin + kTiles < w.tiles ? begin + kTiles : w.tiles;
      expand_digits<kCode, Halves>(w, panel, begin, end, task.scratch, low);
      const Int8Stretch stretch{task.scratch, low, begin, end, panel};
      for_row_tiles<kTileRows>(task.row_begin, task.row_end, [&](auto size, int64_t row) {
        digits_tile<kCode, decltype(size)::value>(task, stretch, row);
      });
    }
  }
}

void matmul_trellis_int8(const MatmulTask& task) {
  with_trellis(*task.w, [&]<Code kCode, int Halves>() {
    if (task.row_end - task.row_begin > kTrellisDirect) trellis_buffered<kCode, Halves>(task);
    else trellis_direct<kCode, Halves>(task);
  });
}

}  // namespace
