// k-bit decoders: from a tile's bit planes (matrix.h) to the codes of a quad, and from codes to int8 levels, floats or
// bfloat16. This is all that a width has of its own; everything that multiplies is shared (matmul.h).
#pragma once

#include "codecs/matrix.h"
#include "simd/repeat.h"

namespace {

using kbit::Matrix;
using kbit::Number;

// Quad Q of one half (0 or 1, its eight quads) of a tile: 64 codes of Bits bits; bits above them are left over from other
// quads. Halves and not whole tiles are what is written out in a row, for the sake of the code's size.
template <int Bits, int Q> __attribute__((always_inline)) inline Bytes quad_codes(const uint8_t* tile, int half) {
  static_assert(Bits >= 2 && Bits <= 8 && Q >= 0 && Q < 8);
  const uint8_t* first = tile + half * (64 * Bits);
  if constexpr (Bits == 8) {
    return load_bytes(first + 64 * Q);
  } else if constexpr (Bits >= 4) {
    const Bytes low = shift<Q % 2 * 4>(load_bytes(first + 64 * (Q / 2)));
    const uint8_t* rest = first + 256;
    if constexpr (Bits == 4) return low;
    if constexpr (Bits == 5) return select_bits(0x0f, low, shift<Q - 4>(load_bytes(rest)));
    if constexpr (Bits >= 6) {
      const Bytes middle = shift<Q % 4 * 2 - 4>(load_bytes(rest + 64 * (Q / 4)));
      if constexpr (Bits == 6) return select_bits(0x0f, low, middle);
      const Bytes high = shift<Q - 6>(load_bytes(rest + 128));
      return select_bits(0x0f, low, select_bits(0x30, middle, high));
    }
  } else {
    const Bytes low = shift<Q % 4 * 2>(load_bytes(first + 64 * (Q / 4)));
    if constexpr (Bits == 2) return low;
    return select_bits(0x03, low, shift<Q - 2>(load_bytes(first + 128)));
  }
}

// Level c of a code c: what is taken off all levels, w.zero, is taken off the sums instead.
template <int Bits> struct PlainLevels {
  static constexpr bool kPlain = true;
  explicit PlainLevels(const int8_t*) {}
  __attribute__((always_inline)) Bytes of(Bytes codes) const { return and_bits(codes, uint8_t((1 << Bits) - 1)); }
};

// How many quads of plain levels can be summed as Pairs (simd/scalar.h), up to the 4 of a segment of 16 columns.
constexpr int pair_chain(int bits) {
  const int most = 32767 / (2 * 127 * ((1 << bits) - 1));
  return most < 4 ? most : 4;
}

// Codes to int8 levels plus kLevelBias, by table: the table ignores what stands above the code.
template <int Bits> struct Levels {
  static constexpr bool kPlain = false;
  static constexpr int kIndexBits = Bits < 4 ? 4 : Bits;
  Table<kIndexBits> table;

  explicit Levels(const int8_t* digits) {
    uint8_t entries[1 << kIndexBits];
    for (int i = 0; i < 1 << kIndexBits; ++i) entries[i] = uint8_t(digits[i & ((1 << Bits) - 1)] + kLevelBias);
    table = make_table<kIndexBits>(entries);
  }
  __attribute__((always_inline)) Bytes of(Bytes codes) const { return lookup(table, codes); }
};

// Eight bits whose level is code - 128: with a bias of 128 the code is the biased level; without, its top bit flips.
struct DirectLevels {
  static constexpr bool kPlain = false;
  explicit DirectLevels(const int8_t*) {}
  __attribute__((always_inline)) Bytes of(Bytes codes) const {
    if constexpr (kLevelBias == 128) return codes;
    return xor_bits(codes, 0x80);
  }
};

inline Floats load_number(const void* p, int64_t index, Number kind) {
  switch (kind) {
    case Number::half: return load_half(static_cast<const uint16_t*>(p) + index);
    case Number::bfloat: return load_bfloat(static_cast<const uint16_t*>(p) + index);
    default: return load(static_cast<const float*>(p) + index);
  }
}

// Scales (or offsets, of the same kind) of the 16 rows of a panel, block by block.
struct PanelScales {
  const uint8_t* first;
  int64_t group_bytes, within;
  int group_shift;
  Number kind;

  PanelScales(const Matrix& w, const void* p, int64_t panel)
      : first(static_cast<const uint8_t*>(p) + (w.scale_kind == Number::steps
                                                    ? panel * w.groups * w.group_bytes
                                                    : panel * w.blocks * kbit::kPanelRows * kbit::bytes_of(w.scale_kind))),
        group_bytes(w.group_bytes), within((int64_t{1} << w.group_shift) - 1), group_shift(w.group_shift),
        kind(w.scale_kind) {}
  Floats of(int64_t block) const {
    if (kind != Number::steps) return load_number(first, block * kbit::kPanelRows, kind);
    const uint8_t* group = first + (block >> group_shift) * group_bytes;
    const int8_t* steps = reinterpret_cast<const int8_t*>(group) + (4 + (block & within)) * kbit::kPanelRows;
    return mul(to_float(load_i8(steps)), load(reinterpret_cast<const float*>(group)));
  }
};

inline Floats load_scales(const Matrix& w, const void* p, int64_t panel, int64_t block) {
  return PanelScales(w, p, panel).of(block);
}

// Which block a segment of a panel lies in: walks along a row, segment by segment.
struct BlockWalk {
  const Matrix& w;
  int64_t index, left;  // block, and columns left in it

  BlockWalk(const Matrix& matrix, int64_t column) : w(matrix), index(column / matrix.block) {
    left = matrix.block - column % matrix.block;
  }
  // This segment's block; then on to the next segment.
  int64_t next() {
    const int64_t at = index < w.blocks ? index : w.blocks - 1;
    left -= w.segment;
    if (left == 0) {
      ++index;
      left = w.block;
    }
    return at;
  }
};

// ------------------------------------------------------------------------- whole tiles, for the buffered matmul

template <int Bits, typename Decoder>
inline void expand_levels(const uint8_t* tile, int64_t tiles, const Decoder& decoder, uint8_t* out) {
  for (; tiles > 0; --tiles, tile += 128 * Bits) {
    for (int half = 0; half < 2; ++half, out += 512) {
      repeat<8>([&]<int Q>() __attribute__((always_inline)) {
        store_bytes(out + 64 * Q, decoder.of(quad_codes<Bits, Q>(tile, half)));
      });
    }
  }
}

// Levels of tiles [begin, end) of a panel: 1024 bytes a tile, quad after quad. `digits` is w.high or w.low.
void expand_levels(const Matrix& w, int64_t panel, int64_t begin, int64_t end, const int8_t* digits, uint8_t* out) {
  const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * w.tile_bytes();
  const int64_t tiles = end - begin;
  switch (w.bits) {
    case 2: return expand_levels<2>(tile, tiles, Levels<2>(digits), out);
    case 3: return expand_levels<3>(tile, tiles, Levels<3>(digits), out);
    case 4: return expand_levels<4>(tile, tiles, Levels<4>(digits), out);
    case 5: return expand_levels<5>(tile, tiles, Levels<5>(digits), out);
    case 6: return expand_levels<6>(tile, tiles, Levels<6>(digits), out);
    case 7: return expand_levels<7>(tile, tiles, Levels<7>(digits), out);
    case 8:
      if (w.direct) return expand_levels<8>(tile, tiles, DirectLevels(digits), out);
      return expand_levels<8>(tile, tiles, Levels<8>(digits), out);
  }
}

// The codes themselves, for plain levels.
void expand_codes(const Matrix& w, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
  const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * w.tile_bytes();
  const int64_t tiles = end - begin;
  switch (w.bits) {
    case 2: return expand_levels<2>(tile, tiles, PlainLevels<2>(nullptr), out);
    case 3: return expand_levels<3>(tile, tiles, PlainLevels<3>(nullptr), out);
    case 4: return expand_levels<4>(tile, tiles, PlainLevels<4>(nullptr), out);
    case 5: return expand_levels<5>(tile, tiles, PlainLevels<5>(nullptr), out);
    case 6: return expand_levels<6>(tile, tiles, PlainLevels<6>(nullptr), out);
    case 7: return expand_levels<7>(tile, tiles, PlainLevels<7>(nullptr), out);
  }
}

// Weights of tiles [begin, end) of a panel as floats, [column][16 rows]: codebook * scale (+ offset), each rounded, as
// formats/quant_tensor.py defines them.
template <int Bits>
inline void expand_floats(const Matrix& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * (128 * Bits);
  const int quads = w.segment / 4;
  BlockWalk walk(w, begin * kbit::kTileColumns);
  alignas(64) uint8_t codes[1024];
  for (int64_t t = begin; t < end; ++t, tile += 128 * Bits) {
    for (int half = 0; half < 2; ++half) {
      repeat<8>([&]<int Q>() __attribute__((always_inline)) {
        store_bytes(codes + half * 512 + 64 * Q, and_bits(quad_codes<Bits, Q>(tile, half), uint8_t((1 << Bits) - 1)));
      });
    }
    for (int first = 0; first < 16; first += quads) {
      const int64_t block = walk.next();
      const Floats scale = load_scales(w, w.scales, panel, block);
      const Floats offset = w.offsets ? load_scales(w, w.offsets, panel, block) : zero();
      for (int q = first; q < first + quads; ++q) {
        const Ints four = as_ints(load_bytes(codes + 64 * q));  // lane: the codes of one row's columns 4q .. 4q+3
        repeat<4>([&]<int J>() __attribute__((always_inline)) {
          const Ints index = and_bits(shift_right<8 * J>(four), 255);
          Floats value = mul(lookup<Bits>(w.codebook, index), scale);
          if (w.offsets) value = add(value, offset);
          store(out, value);
          out += 16;
        });
      }
    }
  }
}

}  // namespace
