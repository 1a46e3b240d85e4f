// x W^T for packed weights: k decoders (unpack.h) and one multiplication per kind of arithmetic.
//
// Few rows of x (decoding a token, a batch, a draft): codes go from memory to registers to the dot product, where
// kDirectRows rows of x meet them; the next rows have them decoded again, from cache ("direct"). Many rows (a prompt): a
// stretch of a few panels is decoded into a buffer in cache, then multiplied with register tiles of kTileRows x
// kTilePanels ("buffered").
//
// Every output is the same sequence of roundings in both: for each segment in order, an exact integer dot product, then
//     sum = fma(float(dot), scale_w * scale_x, sum)
// so results do not depend on how many rows are computed together. The same holds for fp32 (a chain of fma over k).
#pragma once

#include "isa/kernels.h"
#include "codecs/unpack.h"

namespace {

using kbit::MatmulTask;

// Rows of the direct multiplication: as many sums, integer and float, as registers allow.
constexpr int kDirectRows = kTileRows * kTilePanels >= 8 ? 8 : kTileRows;

// Most rows that are multiplied so, pass after pass; to write a byte for each weight and read it back costs more than to
// decode it a few times. A pass of SmolLM2 at 4 bits on Zen 4, one thread, milliseconds, direct against buffered: 16 rows
// 13.7 and 21.8, 32 rows 24.9 and 30.6, 64 rows 48 and 55, 96 rows 78 and 79; with avx2 (kDirectRows 4) 16 rows 37 and 39,
// 64 rows 142 and 129.
constexpr int kDirectMost = 8 * kDirectRows;
static_assert(kDirectMost >= kbit::kRowsWithoutScratch);

// Memory is asked for ahead of the decoder. Codes of up to kPrefetchedBits: every line, as decoding keeps up with nothing
// else. Wider codes: one line in a tile, into the second-level cache, which is enough to start the hardware's own prefetchers on
// the next page; more would take the first-level cache's few line buffers from the loads themselves. Decoding a token of
// SmolLM2 on Zen 4, one thread, best tenth, milliseconds: 2 bits 1.9 with every line against 2.6 with one; 8 bits 7.7
// against 5.5, and 6.9 with none.
constexpr int kPrefetchBytes = 4096;
// Of each stream where a wide code has several: more than hardware prefetchers follow, so every line is asked for. 8 bits
// in seven streams, 4864 x 896 from memory, one core of a Zen 5, one row, over plain 8 bits: 1.67 with one line of each,
// 1.00 so, 1.25 and 1.14 at half and twice this distance.
constexpr int kPrefetchStreams = 2048;

// Runs a register tile over all rows of a task: function(Size<rows>, first row).
template <int N> struct Size { static constexpr int value = N; };

template <int kMost, typename Function> inline void for_row_tiles(int64_t begin, int64_t end, Function&& function) {
  int64_t row = begin;
  for (; row + kMost <= end; row += kMost) function(Size<kMost>{}, row);
  if constexpr (kMost > 1) {
    if (row < end) for_row_tiles<(kMost + 1) / 2>(row, end, function);
  }
}

// ----------------------------------------------------------------------------------------------- int8, direct

// kRows rows from `row` on; where the task has fewer, its last one takes the places of those missing, and is written as often.
template <typename Tile, typename Decoder, bool kTwoDigits, int kRows>
void int8_direct_rows(const MatmulTask& task, int64_t row) {
  constexpr int Bits = Tile::kBits;
  const Matrix& w = *task.w;
  const Decoder high(w.high), low(kTwoDigits ? w.low : w.high);
  constexpr bool kInPairs = Decoder::kPlain && kPairs;
  // Independent sums, so that a dot product need not wait for the one before (4 cycles). Integers: the same result. Codes
  // of up to 3 bits are slowed by the additions that join them.
  constexpr int kChains = kInPairs || Bits <= 3 || kRows > 2 ? 1 : 4 / kRows;
  const int32_t bias = Decoder::kPlain ? w.zero : kLevelBias;
  const int last_quarter = w.segment / 16 - 1;  // of a segment: 0, 1 or 3
  const int8_t* codes[kRows];
  const float* scales[kRows];
  const int32_t* sums[kRows];
  float* outs[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = row + r < task.row_end ? row + r : task.row_end - 1;
    codes[r] = task.x.codes + at * task.x.codes_stride;
    scales[r] = task.x.scales + at * task.x.segments_stride;
    sums[r] = task.x.sums + at * task.x.segments_stride;
    outs[r] = task.out + (at - task.row_begin) * task.out_stride;
  }
  const float inverse = 1.0f / w.level_scale;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    Tile tile(w, panel, 0);
    BlockWalk walk(w, 0);
    const PanelScales scale_of(w, w.scales, panel), offset_of(w, w.offsets ? w.offsets : w.scales, panel);
    Floats total[kRows];
    Ints dot[kRows][kChains], fine[kRows][kChains];
    for (int r = 0; r < kRows; ++r) total[r] = zero();
    int64_t segment = 0;
    for (int64_t t = 0; t < w.tiles; ++t, tile.next()) {
      // Not a function of its own: GCC 12 takes one that only prefetches for one that does nothing.
      if constexpr (Bits <= kPrefetchedBits || Tile::kStreams > 1) {
        constexpr int kAhead = Bits <= kPrefetchedBits ? kPrefetchBytes : kPrefetchStreams;
        for (int line = 0; line < Tile::kLines; ++line) prefetch(tile.line(line) + kAhead);
      } else {
        prefetch_second(tile.line(0) + kPrefetchBytes);
      }
      for (int half = 0; half < 2; ++half) {
        const HalfTile<Tile> all(tile, half);
        repeat<2>([&]<int kQuarter>() __attribute__((always_inline)) {  // 16 columns, the least that a segment has
          const int quarter = 2 * half + kQuarter;
          const int64_t column = t * 64 + quarter * 16;
          if ((quarter & last_quarter) == 0) {
            for (int r = 0; r < kRows; ++r)
              for (int c = 0; c < kChains; ++c)
                fine[r][c] = dot[r][c] = broadcast(c == 0 ? -bias * sums[r][segment] : 0);
          }
          Pairs pairs[kRows];
          repeat<4>([&]<int kQuad>() __attribute__((always_inline)) {
            constexpr int Q = 4 * kQuarter + kQuad;
            const Bytes code = all.template quad<Q>();
            const Bytes level = high.of(code);
            if constexpr (kInPairs) {
              constexpr int kChain = pair_chain(Bits);
              for (int r = 0; r < kRows; ++r) {
                pairs[r] = dot4(kQuad % kChain == 0 ? no_pairs() : pairs[r], level, codes[r] + column + 4 * kQuad);
                if constexpr (kQuad % kChain == kChain - 1) dot[r][0] = add(dot[r][0], pairs[r]);
              }
            } else {
              constexpr int c = Q % kChains;
              for (int r = 0; r < kRows; ++r) dot[r][c] = dot4(dot[r][c], level, codes[r] + column + 4 * kQuad);
              if constexpr (kTwoDigits) {
                const Bytes digit = low.of(code);
                for (int r = 0; r < kRows; ++r) fine[r][c] = dot4(fine[r][c], digit, codes[r] + column + 4 * kQuad);
              }
            }
          });
          if ((quarter & last_quarter) != last_quarter) return;
          const int64_t block = walk.next();
          const Floats scale = scale_of.of(block);
          for (int r = 0; r < kRows; ++r) {
            for (int c = 1; c < kChains; ++c) dot[r][0] = add(dot[r][0], dot[r][c]);
            Floats value = to_float(dot[r][0]);
            if constexpr (kTwoDigits) {
              for (int c = 1; c < kChains; ++c) fine[r][0] = add(fine[r][0], fine[r][c]);
              value = fma(to_float(fine[r][0]), broadcast(1.0f / kbit::kLowSteps), value);
            }
            total[r] = fma(value, mul(scale, broadcast(scales[r][segment])), total[r]);
          }
          if (w.offsets) {
            const Floats offset = offset_of.of(block);
            for (int r = 0; r < kRows; ++r) {
              const float sum = scales[r][segment] * float(sums[r][segment]) * inverse;
              total[r] = fma(offset, broadcast(sum), total[r]);
            }
          }
          ++segment;
        });
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(outs[r] + (panel - task.panel_begin) * 16, mul(total[r], broadcast(w.level_scale)));
    }
  }
}

// The last rows go into one tile where the next smaller one does not hold them: to decode weights again costs more than to
// multiply a row twice.
template <typename Tile, typename Decoder, bool kTwoDigits, int kRows = kDirectRows>
void int8_direct(const MatmulTask& task, int64_t row) {
  constexpr int kFewer = (kRows + 1) / 2;
  for (; row + kRows <= task.row_end; row += kRows) int8_direct_rows<Tile, Decoder, kTwoDigits, kRows>(task, row);
  if constexpr (kRows > 1) {
    if (row == task.row_end) return;
    if (row + kFewer < task.row_end) return int8_direct_rows<Tile, Decoder, kTwoDigits, kRows>(task, row);
    int8_direct<Tile, Decoder, kTwoDigits, kFewer>(task, row);
  }
}

template <typename Tile, typename Decoder, bool kTwoDigits> void int8_direct(const MatmulTask& task) {
  int8_direct<Tile, Decoder, kTwoDigits>(task, task.row_begin);
}

// --------------------------------------------------------------------------------------------- int8, buffered

// Columns of a panel that are decoded at once. A multiple of 64; two panels of 1024 columns fill 32 KB.
constexpr int64_t kBufferColumns = 1024;

struct Int8Stretch {
  const uint8_t* high;  // levels, [panel][tile][1024]
  const uint8_t* low;
  int64_t tile_begin, tile_end, panel;
};

// kChain: 0 for levels, and for plain codes how many quads are summed as Pairs.
template <int kRows, int kPanels, bool kTwoDigits, int kChain>
void int8_tile(const MatmulTask& task, const Int8Stretch& stretch, int64_t row) {
  const Matrix& w = *task.w;
  const int64_t tiles = stretch.tile_end - stretch.tile_begin, column = stretch.tile_begin * 64;
  const int quads = w.segment / 4;
  const int32_t bias = kChain ? w.zero : kLevelBias;
  const int64_t first_segment = column / w.segment;
  float* out = task.out + (row - task.row_begin) * task.out_stride + (stretch.panel - task.panel_begin) * 16;
  const int8_t* codes = task.x.codes + row * task.x.codes_stride + column;
  const float* scales = task.x.scales + row * task.x.segments_stride + first_segment;
  const int32_t* sums = task.x.sums + row * task.x.segments_stride + first_segment;
  const float inverse = 1.0f / w.level_scale;
  BlockWalk walk(w, column);
  static_assert(kPanels <= 2);
  const void* offsets = w.offsets ? w.offsets : w.scales;
  const PanelScales panel_scales[2] = {{w, w.scales, stretch.panel}, {w, w.scales, stretch.panel + kPanels - 1}};
  const PanelScales panel_offsets[2] = {{w, offsets, stretch.panel}, {w, offsets, stretch.panel + kPanels - 1}};
  Floats total[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p)
      total[r][p] = stretch.tile_begin == 0 ? zero() : load(out + r * task.out_stride + 16 * p);
  for (int64_t s = 0; s < tiles * (16 / quads); ++s) {
    Ints dot[kRows][kPanels], fine[kRows][kPanels];
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kPanels; ++p) {
        dot[r][p] = broadcast(-bias * sums[r * task.x.segments_stride + s]);
        if constexpr (kTwoDigits) fine[r][p] = dot[r][p];
      }
    if constexpr (kChain > 0) {
      for (int64_t quad = s * quads; quad < (s + 1) * quads; quad += kChain) {
        Pairs pairs[kRows][kPanels];
        repeat<kChain>([&]<int kQuad>() __attribute__((always_inline)) {
          for (int p = 0; p < kPanels; ++p) {
            const Bytes level = load_bytes(stretch.high + (p * tiles * 16 + quad + kQuad) * 64);
            for (int r = 0; r < kRows; ++r) {
              const int8_t* x = codes + r * task.x.codes_stride + 4 * (quad + kQuad);
              pairs[r][p] = dot4(kQuad == 0 ? no_pairs() : pairs[r][p], level, x);
            }
          }
        });
        for (int r = 0; r < kRows; ++r)
          for (int p = 0; p < kPanels; ++p) dot[r][p] = add(dot[r][p], pairs[r][p]);
      }
    } else {
      for (int64_t first = s * quads; first < (s + 1) * quads; first += kTileQuads) {
        repeat<kTileQuads>([&]<int kQuad>() __attribute__((always_inline)) {
          const int64_t quad = first + kQuad;
          Bytes level[kPanels], digit[kPanels];
          for (int p = 0; p < kPanels; ++p) {
            level[p] = load_bytes(stretch.high + (p * tiles * 16 + quad) * 64);
            if constexpr (kTwoDigits) digit[p] = load_bytes(stretch.low + (p * tiles * 16 + quad) * 64);
          }
          for (int r = 0; r < kRows; ++r)
            for (int p = 0; p < kPanels; ++p) {
              const int8_t* x = codes + r * task.x.codes_stride + 4 * quad;
              dot[r][p] = dot4(dot[r][p], level[p], x);
              if constexpr (kTwoDigits) fine[r][p] = dot4(fine[r][p], digit[p], x);
            }
        });
      }
    }
    const int64_t block = walk.next();
    Floats scale[kPanels];
    for (int p = 0; p < kPanels; ++p) scale[p] = panel_scales[p].of(block);
    for (int r = 0; r < kRows; ++r) {
      const Floats x_scale = broadcast(scales[r * task.x.segments_stride + s]);
      for (int p = 0; p < kPanels; ++p) {
        Floats value = to_float(dot[r][p]);
        if constexpr (kTwoDigits) value = fma(to_float(fine[r][p]), broadcast(1.0f / kbit::kLowSteps), value);
        total[r][p] = fma(value, mul(scale[p], x_scale), total[r][p]);
      }
    }
    if (w.offsets) {
      Floats offset[kPanels];
      for (int p = 0; p < kPanels; ++p) offset[p] = panel_offsets[p].of(block);
      for (int r = 0; r < kRows; ++r) {
        const int64_t index = r * task.x.segments_stride + s;
        const Floats sum = broadcast(scales[index] * float(sums[index]) * inverse);
        for (int p = 0; p < kPanels; ++p) total[r][p] = fma(offset[p], sum, total[r][p]);
      }
    }
  }
  const bool last = stretch.tile_end == w.tiles;
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p)
      store(out + r * task.out_stride + 16 * p, last ? mul(total[r][p], broadcast(w.level_scale)) : total[r][p]);
}

template <bool kTwoDigits, int kChain = 0> void int8_buffered(const MatmulTask& task) {
  const Matrix& w = *task.w;
  constexpr int64_t kTiles = kBufferColumns / 64;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; panel += kTilePanels) {
    const int64_t panels = task.panel_end - panel < kTilePanels ? task.panel_end - panel : kTilePanels;
    for (int64_t begin = 0; begin < w.tiles; begin += kTiles) {
      const int64_t end = begin + kTiles < w.tiles ? begin + kTiles : w.tiles, bytes = (end - begin) * 1024;
      uint8_t* fine = task.scratch + kTilePanels * kTiles * 1024;
      for (int64_t p = 0; p < panels; ++p) {
        if constexpr (kChain > 0) expand_codes(w, panel + p, begin, end, task.scratch + p * bytes);
        else expand_levels(w, panel + p, begin, end, w.high, task.scratch + p * bytes);
        if constexpr (kTwoDigits) expand_levels(w, panel + p, begin, end, w.low, fine + p * bytes);
      }
      const Int8Stretch stretch{task.scratch, fine, begin, end, panel};
      // Two digits need twice the integer sums. Of avx512's 6 rows 4 leave registers for them: 512 rows of 4096 x 4096 at
      // 7 bits reach 0.47 of oneDNN's int8 product, 0.42 with 3 and 0.21 with 6.
      for_row_tiles<kTwoDigits ? (2 * kTileRows + 1) / 3 : kTileRows>(task.row_begin, task.row_end, [&](auto size, int64_t row) {
        constexpr int kRows = decltype(size)::value;
        if (panels == kTilePanels) {
          int8_tile<kRows, kTilePanels, kTwoDigits, kChain>(task, stretch, row);
        } else {
          for (int64_t p = 0; p < panels; ++p) {
            const Int8Stretch one{task.scratch + p * bytes, fine + p * bytes, begin, end, panel + p};
            int8_tile<kRows, 1, kTwoDigits, kChain>(task, one, row);
          }
        }
      });
    }
  }
}

void int8_buffered(const MatmulTask& task) {
  if constexpr (kPairs) {
    if (task.w->plain) {
      switch (pair_chain(task.w->bits)) {
        case 1: return int8_buffered<false, 1>(task);
        case 2: return int8_buffered<false, 2>(task);
        default: return int8_buffered<false, 4>(task);
      }
    }
  }
  task.w->two_digits ? int8_buffered<true>(task) : int8_buffered<false>(task);
}

template <int Bits> void int8_direct(const MatmulTask& task) {
  if constexpr (Bits < 8) {
    if (task.w->plain) return int8_direct<PackedTile<Bits>, PlainLevels<Bits>, false>(task);
  } else {
    if (task.w->direct) return int8_direct<PackedTile<Bits>, DirectLevels, false>(task);
  }
  with_tile<Bits>(*task.w, [&]<typename Tile>(TileOf<Tile>) {
    if constexpr (Bits >= 6) {
      if (task.w->two_digits) return int8_direct<Tile, Levels<Bits>, true>(task);
    }
    int8_direct<Tile, Levels<Bits>, false>(task);
  });
}

[[maybe_unused]] void matmul_int8(const MatmulTask& task) {
  if (task.row_end - task.row_begin > kDirectMost) return int8_buffered(task);
  switch (task.w->bits) {
    case 2: return int8_direct<2>(task);
    case 3: return int8_direct<3>(task);
    case 4: return int8_direct<4>(task);
    case 5: return int8_direct<5>(task);
    case 6: return int8_direct<6>(task);
    case 7: return int8_direct<7>(task);
    case 8: return int8_direct<8>(task);
  }
}

}  // namespace
