// x W^T on AMX tiles (simd/amx_tiles.h): int8 for many rows of x, bfloat16 for any number. A tile of decoded weights is
// exactly a tile register's B, so the decoders are those of unpack.h.
//
// Rows of x are taken in blocks of 32, weights in pairs of panels: two A, two B and four C tiles, so each load serves
// two multiplications.
//
// int8: a multiplication takes 16 cycles and leaves 256 integers to be scaled, segment by segment, in the rounding
// steps of matmul.h: the scaling takes longer than the multiplications, and all arrangements here are for its sake.
//   - Integers go to memory, and are scaled four segments (a unit) at a time: sums and scales then stay in registers.
//   - The scaling of one unit is written between the multiplications of the next, in quarters, so that the tiles and
//     the vector units work at the same time:
//
//        tiles     | unit 0: s0 s1 s2 s3 | unit 1: s0 s1 s2 s3 | ..
//        vectors   |                     | unit 0: rows 0-7 8-15 16-23 24-31 | ..
#pragma once

#include "matmul/matmul.h"
#include "matmul/matmul_float.h"
#include "simd/amx_tiles.h"

namespace {

constexpr int kTileInts = kTileRegisterRows * 16;
constexpr int kBlockOfRows = 2 * kTileRegisterRows;

// Rows of x as tiles: two per block of 32 rows. A is read where it lies, but a tile that is not full (the last one)
// from a copy, padded with zeros.
struct RowBlock {
  int64_t row;  // of the pass
  int rows;
  const uint8_t* a[2];  // column 0 of a stretch; a[1] null: one tile
  int64_t stride[2];    // bytes
};

struct RowBlocks {
  const uint8_t* x;  // row 0 of the pass
  int64_t stride, row_begin, row_end;
  uint8_t* rest;  // the copy
  int64_t rest_stride;

  int64_t count() const { return (row_end - row_begin + kBlockOfRows - 1) / kBlockOfRows; }
  // Copies the rows of the last tile, if it is not full.
  void copy_rest(int64_t offset, int64_t bytes) const {
    const int64_t rows = (row_end - row_begin) % kTileRegisterRows;
    if (rows == 0) return;
    for (int64_t r = 0; r < kTileRegisterRows; ++r) {
      if (r < rows) {
        memcpy(rest + r * rest_stride, x + (row_end - rows + r) * stride + offset, size_t(bytes));
      } else {
        memset(rest + r * rest_stride, 0, size_t(bytes));
      }
    }
  }
  // offset: bytes from a row's start to the stretch.
  RowBlock at(int64_t index, int64_t offset) const {
    RowBlock block{row_begin + index * kBlockOfRows, kBlockOfRows, {nullptr, nullptr}, {stride, stride}};
    if (row_end - block.row < kBlockOfRows) block.rows = int(row_end - block.row);
    for (int i = 0; i < 2 && i * kTileRegisterRows < block.rows; ++i) {
      const bool full = block.rows - i * kTileRegisterRows >= kTileRegisterRows;
      block.a[i] = full ? x + (block.row + i * kTileRegisterRows) * stride + offset : rest;
      if (!full) block.stride[i] = rest_stride;
    }
    return block;
  }
};

// ------------------------------------------------------------------------------------------------------- int8

constexpr int kUnitSegments = 4;
constexpr int64_t kStretchTiles = 8;  // 512 columns of two panels are 16 KB of levels

struct Int8TileScratch {
  alignas(64) uint8_t levels[4 * kStretchTiles][1024];  // [panel, or panel and digit][tile]
  float scales[kStretchTiles][2][16], offsets[kStretchTiles][2][16];  // [tile][panel]
  uint8_t rest[kTileRegisterRows][64 * kStretchTiles];
  // [unit modulo 2][segment][pair of B][A][B]; one digit: B is a panel; two digits: a pair is a panel and B a digit
  alignas(64) int32_t sums[2][kUnitSegments][2][2][2][kTileInts];
};
static_assert(sizeof(Int8TileScratch) <= size_t(kbit::kMatmulScratch));

struct Int8Unit {
  RowBlock rows;
  int64_t tile;  // first, within the stretch
  int segments;
};

// The C tiles 2 i + j = A i times B j, for one segment.
inline void multiply_segment(const RowBlock& rows, int64_t column, const uint8_t* b0, const uint8_t* b1) {
  tile_zero<0>();
  tile_load<4>(rows.a[0] + column, rows.stride[0]);
  tile_load<6>(b0, 64);
  tile_dot_int8<0, 4, 6>();
  if (b1) {
    tile_zero<1>();
    tile_load<7>(b1, 64);
    tile_dot_int8<1, 4, 7>();
  }
  if (rows.a[1]) {
    tile_zero<2>();
    tile_load<5>(rows.a[1] + column, rows.stride[1]);
    tile_dot_int8<2, 5, 6>();
    if (b1) {
      tile_zero<3>();
      tile_dot_int8<3, 5, 7>();
    }
  }
}

inline void store_segment(const RowBlock& rows, bool two, int32_t (*sums)[2][kTileInts]) {
  tile_store<0>(sums[0][0], 64);
  if (two) tile_store<1>(sums[0][1], 64);
  if (rows.a[1]) {
    tile_store<2>(sums[1][0], 64);
    if (two) tile_store<3>(sums[1][1], 64);
  }
}

template <int kPanels, bool kTwoDigits> struct Int8Tiles {
  const MatmulTask& task;
  Int8TileScratch& scratch;
  int64_t panel;
  int64_t begin = 0, end = 0;  // tiles of the stretch
  const int8_t* digits[2];     // for expand_levels

  // Levels without the bias that vpdpbusd wants, and scales, of a stretch.
  void expand() {
    const Matrix& w = *task.w;
    constexpr int kDigits = kTwoDigits ? 2 : 1;
    for (int p = 0; p < kPanels; ++p) {
      for (int d = 0; d < kDigits; ++d) {
        uint8_t* out = scratch.levels[(p * kDigits + d) * kStretchTiles];
        if (w.direct) {
          const uint8_t* codes = w.codes + (panel + p) * w.panel_bytes() + begin * 1024;
          for (int64_t i = 0; i < (end - begin) * 1024; i += 64)
            store_bytes(out + i, xor_bits(load_bytes(codes + i), 0x80));  // code - 128
        } else {
          expand_levels(w, panel + p, begin, end, digits[d], out);
        }
      }
      BlockWalk walk(w, begin * 64);
      for (int64_t t = 0; t < end - begin; ++t) {
        const int64_t block = walk.next();
        store(scratch.scales[t][p], load_scales(w, w.scales, panel + p, block));
        if (w.offsets) store(scratch.offsets[t][p], load_scales(w, w.offsets, panel + p, block));
      }
    }
  }

  // Adds a unit's integers to the results of rows [first, last) of its block. kSegments: how many, or 0 for any number.
  template <int kSegments, bool kOffsets>
  void scale_rows(const Int8Unit& unit, int64_t slot, int first, int last) const {
    const Matrix& w = *task.w;
    const int segments = kSegments ? kSegments : unit.segments;
    const int64_t segment = begin + unit.tile;  // of the row: one per tile
    const bool opens = segment == 0, closes = segment + segments == w.tiles;
    const float inverse = 1.0f / w.level_scale;
    const Floats low_step = broadcast(1.0f / kbit::kLowSteps), level_scale = broadcast(w.level_scale);
    Floats scale[kUnitSegments][kPanels];  // for all rows: loads are what this is short of
    for (int s = 0; s < segments; ++s)
      for (int p = 0; p < kPanels; ++p) scale[s][p] = load(scratch.scales[unit.tile + s][p]);
    const int64_t row = unit.rows.row + first, x_stride = task.x.segments_stride, out_stride = task.out_stride;
    const float* x_scales = task.x.scales + row * x_stride + segment;
    const int32_t* x_sums = task.x.sums + row * x_stride + segment;
    float* out = task.out + (row - task.row_begin) * out_stride + (panel - task.panel_begin) * 16;
    for (int r = first; r < last; ++r, x_scales += x_stride, x_sums += x_stride, out += out_stride) {
      const int a = r / kTileRegisterRows, at = r % kTileRegisterRows * 16;
      Floats total[kPanels];
      for (int p = 0; p < kPanels; ++p) total[p] = opens ? zero() : load(out + 16 * p);
      for (int s = 0; s < segments; ++s) {
        const auto& sums = scratch.sums[slot][s];
        const Floats x_scale = broadcast(x_scales[s]);
        for (int p = 0; p < kPanels; ++p) {
          Floats value = to_float(load_ints(kTwoDigits ? sums[p][a][0] + at : sums[0][a][p] + at));
          if constexpr (kTwoDigits) value = fma(to_float(load_ints(sums[p][a][1] + at)), low_step, value);
          total[p] = fma(value, mul(scale[s][p], x_scale), total[p]);
        }
        if constexpr (kOffsets) {
          const Floats x_sum = broadcast(x_scales[s] * float(x_sums[s]) * inverse);
          for (int p = 0; p < kPanels; ++p) total[p] = fma(load(scratch.offsets[unit.tile + s][p]), x_sum, total[p]);
        }
      }
      for (int p = 0; p < kPanels; ++p) store(out + 16 * p, closes ? mul(total[p], level_scale) : total[p]);
    }
  }

  void scale_quarter(const Int8Unit& unit, int64_t slot, int quarter) const {
    const int first = quarter * (kBlockOfRows / kUnitSegments);
    int last = first + kBlockOfRows / kUnitSegments;
    if (last > unit.rows.rows) last = unit.rows.rows;
    if (task.w->offsets) {
      if (unit.segments == kUnitSegments) return scale_rows<kUnitSegments, true>(unit, slot, first, last);
      return scale_rows<0, true>(unit, slot, first, last);
    }
    if (unit.segments == kUnitSegments) return scale_rows<kUnitSegments, false>(unit, slot, first, last);
    scale_rows<0, false>(unit, slot, first, last);
  }

  void multiply_stretch(const RowBlocks& blocks) const {
    const int64_t tiles = end - begin, units = (tiles + kUnitSegments - 1) / kUnitSegments;
    const bool two = kTwoDigits || kPanels == 2;
    constexpr int kPairs = kTwoDigits ? kPanels : 1;
    Int8Unit previous{};
    for (int64_t index = 0; index <= blocks.count() * units; ++index) {
      Int8Unit unit{};
      if (index < blocks.count() * units) {
        unit.rows = blocks.at(index / units, begin * 64);
        unit.tile = index % units * kUnitSegments;
        unit.segments = tiles - unit.tile < kUnitSegments ? int(tiles - unit.tile) : kUnitSegments;
      }
      for (int s = 0; s < kUnitSegments; ++s) {
        for (int pair = 0; pair < kPairs; ++pair) {
          const int64_t t = unit.tile + s;
          if (s < unit.segments) {
            const uint8_t* b0 = scratch.levels[2 * pair * kStretchTiles + t];
            multiply_segment(unit.rows, t * 64, b0, two ? b0 + kStretchTiles * 1024 : nullptr);
          }
          // Between a multiplication and its store, as the tiles need a while to finish.
          if (pair == 0 && index > 0) scale_quarter(previous, (index - 1) & 1, s);
          if (s < unit.segments) store_segment(unit.rows, two, scratch.sums[index & 1][s][pair]);
        }
      }
      previous = unit;
    }
  }

  void run() {
    const int64_t tiles = task.w->tiles;
    for (begin = 0; begin < tiles; begin = end) {
      end = begin + kStretchTiles < tiles ? begin + kStretchTiles : tiles;
      expand();
      const RowBlocks blocks{reinterpret_cast<const uint8_t*>(task.x.codes), task.x.codes_stride, task.row_begin,
                             task.row_end, scratch.rest[0], sizeof scratch.rest[0]};
      blocks.copy_rest(begin * 64, (end - begin) * 64);
      multiply_stretch(blocks);
    }
  }
};

template <bool kTwoDigits> void int8_on_tiles(const MatmulTask& task) {
  const Matrix& w = *task.w;
  Int8TileScratch& scratch = *reinterpret_cast<Int8TileScratch*>(task.scratch);
  int8_t digits[2][256];  // with what expand_levels adds taken off (both wrap around)
  for (int c = 0; c < 1 << w.bits; ++c) {
    digits[0][c] = int8_t(w.high[c] - kLevelBias);
    digits[1][c] = kTwoDigits ? int8_t(w.low[c] - kLevelBias) : int8_t(0);
  }
  for (int64_t panel = task.panel_begin; panel < task.panel_end; panel += 2) {
    if (panel + 1 < task.panel_end) {
      Int8Tiles<2, kTwoDigits>{task, scratch, panel, 0, 0, {digits[0], digits[1]}}.run();
    } else {
      Int8Tiles<1, kTwoDigits>{task, scratch, panel, 0, 0, {digits[0], digits[1]}}.run();
    }
  }
}

// Few rows are bound by reading the weights, which matmul.h does without a buffer; segments below 64 columns would fill
// a part of a tile only. Both are left to the set that tiles are added to.
template <const kbit::Kernels& kBase> void matmul_int8_tiles(const MatmulTask& task) {
  constexpr int kFew = kDirectRows > kbit::kRowsWithoutScratch ? kDirectRows : kbit::kRowsWithoutScratch;
  if (task.row_end - task.row_begin <= kFew || task.w->segment != 64) return kBase.matmul_int8(task);
  tiles_begin();
  task.w->two_digits ? int8_on_tiles<true>(task) : int8_on_tiles<false>(task);
  tiles_end();
}

// ------------------------------------------------------------------------------------------------------- bf16

constexpr int64_t kBf16Columns = 1024;  // columns of a panel decoded at once; two panels are 64 KB

struct Bf16TileScratch {
  alignas(64) float floats[kFloatColumns * 16];
  uint8_t pairs[2][kBf16Columns * 32];
  uint8_t rest[kTileRegisterRows][2 * kBf16Columns];
  float part[2][kTileInts];  // C of a tile that is not full
};
static_assert(sizeof(Bf16TileScratch) <= size_t(kbit::kMatmulScratch));

template <int T> inline void open_tile(bool first, const float* c, int64_t stride) {
  if (first) tile_zero<T>();
  else tile_load<T>(c, stride * 4);
}

// out (+)= one block of rows times one stretch of kPanels panels. Every output is summed in the same order whatever the
// block: 32 columns at a time, in one tile register.
template <int kPanels>
void bf16_block(const RowBlock& rows, const uint8_t* b0, const uint8_t* b1, int64_t columns, bool first, float* out,
                int64_t out_stride, float (*part)[kTileInts]) {
  // C where it lies, or for the one tile that is not full in `part`, also from one stretch to the next.
  float* c[2][kPanels];
  int64_t stride[2];
  const int full = rows.rows / kTileRegisterRows;
  for (int i = 0; i < 2; ++i) {
    stride[i] = i < full ? out_stride : 16;
    for (int p = 0; p < kPanels; ++p) c[i][p] = i < full ? out + i * kTileRegisterRows * out_stride + 16 * p : part[p];
  }
  const bool two = rows.a[1] != nullptr;
  open_tile<0>(first, c[0][0], stride[0]);
  if constexpr (kPanels == 2) open_tile<1>(first, c[0][kPanels - 1], stride[0]);
  if (two) {
    open_tile<2>(first, c[1][0], stride[1]);
    if constexpr (kPanels == 2) open_tile<3>(first, c[1][kPanels - 1], stride[1]);
  }
  for (int64_t k = 0; k < columns; k += 32) {
    tile_load<6>(b0 + k * 32, 64);
    tile_load<4>(rows.a[0] + k * 2, rows.stride[0]);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (kPanels == 2) {
      tile_load<7>(b1 + k * 32, 64);
      tile_dot_bf16<1, 4, 7>();
    }
    if (two) {
      tile_load<5>(rows.a[1] + k * 2, rows.stride[1]);
      tile_dot_bf16<2, 5, 6>();
      if constexpr (kPanels == 2) tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(c[0][0], stride[0] * 4);
  if constexpr (kPanels == 2) tile_store<1>(c[0][kPanels - 1], stride[0] * 4);
  if (two) {
    tile_store<2>(c[1][0], stride[1] * 4);
    if constexpr (kPanels == 2) tile_store<3>(c[1][kPanels - 1], stride[1] * 4);
  }
  float* tail = out + full * kTileRegisterRows * out_stride;
  for (int r = 0; r < rows.rows % kTileRegisterRows; ++r)
    for (int p = 0; p < kPanels; ++p) store(tail + r * out_stride + 16 * p, load(part[p] + 16 * r));
}

// For any number of rows: vdpbf16ps sums in another order, and results are not to depend on how many rows there are.
void matmul_bf16_tiles(const MatmulTask& task) {
  const Matrix& w = *task.w;
  Bf16TileScratch& scratch = *reinterpret_cast<Bf16TileScratch*>(task.scratch);
  const RowBlocks blocks{reinterpret_cast<const uint8_t*>(task.x.codes), task.x.codes_stride, task.row_begin,
                         task.row_end, scratch.rest[0], sizeof scratch.rest[0]};
  tiles_begin();
  for (int64_t panel = task.panel_begin; panel < task.panel_end; panel += 2) {
    const int64_t panels = task.panel_end - panel < 2 ? 1 : 2;
    for (int64_t column = 0, columns; column < w.tiles * 64; column += columns) {
      columns = w.tiles * 64 - column < kBf16Columns ? w.tiles * 64 - column : kBf16Columns;
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t k = 0; k < columns; k += kFloatColumns) {
          const int64_t count = columns - k < kFloatColumns ? columns - k : kFloatColumns;
          expand_floats(w, panel + p, (column + k) / 64, (column + k + count) / 64, scratch.floats);
          pair_columns(scratch.floats, count, scratch.pairs[p] + k * 32);
        }
      }
      blocks.copy_rest(column * 2, columns * 2);
      for (int64_t i = 0; i < blocks.count(); ++i) {
        const RowBlock rows = blocks.at(i, column * 2);
        float* out = task.out + (rows.row - task.row_begin) * task.out_stride + (panel - task.panel_begin) * 16;
        const auto block = panels == 2 ? bf16_block<2> : bf16_block<1>;
        block(rows, scratch.pairs[0], scratch.pairs[1], columns, column == 0, out, task.out_stride, scratch.part);
      }
    }
  }
  tiles_end();
}

}  // namespace

// The products kbit::tiles_<set>, over the kernels of `base`: included last by isa/<set>.cpp.
#define KBIT_DEFINE_TILE_PRODUCTS(set, base)                                                        \
  namespace kbit {                                                                                  \
  extern const Kernels kernels_##base;                                                              \
  extern const TileProducts tiles_##set;                                                            \
  const TileProducts tiles_##set = {::matmul_int8_tiles<kernels_##base>, ::matmul_bf16_tiles};      \
  }
