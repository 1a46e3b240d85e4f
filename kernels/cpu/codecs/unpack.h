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

// The codes of a tile where all planes of a half lie together.
template <int Bits> struct PackedTile {
  static constexpr int kBits = Bits, kStreams = 1, kLines = 2 * Bits;
  const uint8_t* at;

  PackedTile(const Matrix& w, int64_t panel, int64_t tile) : at(w.codes + (panel * w.tiles + tile) * (128 * Bits)) {}
  void next() { at += 128 * Bits; }
  // The cache lines of a tile; those of streams come first.
  const uint8_t* line(int i) const { return at + 64 * i; }
  template <int Q> __attribute__((always_inline)) Bytes quad(int half) const { return quad_codes<Bits, Q>(at, half); }
};

// The same where every bit from the third on has a stream of its own.
template <int Bits> struct ApartTile {
  static_assert(Bits >= 3);
  static constexpr int kBits = Bits, kFurther = Bits - 2, kStreams = kFurther + 1, kLines = 2 * Bits;
  const uint8_t* two;
  const uint8_t* one[kFurther];

  ApartTile(const Matrix& w, int64_t panel, int64_t tile) : two(w.codes + (panel * w.tiles + tile) * 256) {
    for (int i = 0; i < kFurther; ++i) one[i] = w.further[i] + (panel * w.tiles + tile) * 128;
  }
  void next() {
    two += 256;
    for (int i = 0; i < kFurther; ++i) one[i] += 128;
  }
  const uint8_t* line(int i) const {
    if (i < kStreams) return i == 0 ? two : one[i - 1];
    if (i < kStreams + kFurther) return one[i - kStreams] + 64;
    return two + 64 * (i - kStreams - kFurther + 1);
  }
  template <int Q> __attribute__((always_inline)) Bytes quad(int half) const {
    Bytes code = quad_codes<2, Q>(two, half);
    repeat<kFurther>([&]<int I>() __attribute__((always_inline)) {
      code = select_bits(uint8_t((4 << I) - 1), code, shift<Q - 2 - I>(load_bytes(one[I] + 64 * half)));
    });
    return code;
  }
};

// The codes of half a tile, quad by quad.
template <typename Tile> struct HalfTile {
  const Tile& tile;
  int half;

  HalfTile(const Tile& of, int which) : tile(of), half(which) {}
  template <int Q> __attribute__((always_inline)) Bytes quad() const { return tile.template quad<Q>(half); }
};

// Of two vectors, what stands in the bits `Mask` of all bytes, side by side in one, and the rest in the other.
template <int Distance, uint8_t Mask> __attribute__((always_inline)) inline void exchange(Bytes& a, Bytes& b) {
  const Bytes first = select_bits(Mask, a, shift<-Distance>(b));
  b = select_bits(Mask, shift<Distance>(a), b);
  a = first;
}

// Eight bits in streams of their own, for all quads at once, where there are registers for them: a bit matrix, planes by
// quads, is transposed in three rounds of exchanges, seven operations a quad instead of thirteen. A place in a byte has
// three digits; each round puts one digit of a bit's number there for one of its quad's.
template <> struct HalfTile<ApartTile<8>> {
  static constexpr bool kTogether = kTileRows * kTilePanels >= 8;
  const ApartTile<8>& tile;
  int half;
  Bytes codes[kTogether ? 8 : 1];

  __attribute__((always_inline)) HalfTile(const ApartTile<8>& of, int which) : tile(of), half(which) {
    if constexpr (kTogether) {
      Bytes bits[8];  // pairs of code bits: 0 1, 2 3, .., by the last digit of the quad
      for (int i = 0; i < 2; ++i) bits[i] = load_bytes(of.two + 128 * which + 64 * i);
      for (int i = 0; i < 6; ++i) bits[2 + i] = load_bytes(of.one[i] + 64 * which);
      exchange<2, 0x33>(bits[0], bits[1]);
      for (int i = 0; i < 2; ++i) {  // the quad's first two digits as the others have them
        const Bytes b = bits[i];
        bits[i] = select_bits(0xc3, b, select_bits(0x30, shift<-2>(b), shift<2>(b)));
      }
      for (int pair = 2; pair < 8; pair += 2) exchange<1, 0x55>(bits[pair], bits[pair + 1]);
      for (int i = 0; i < 2; ++i) {
        exchange<4, 0x0f>(bits[i], bits[4 + i]);      // 0 1 with 4 5: by the quad's first digit, of the first four quads ..
        exchange<4, 0x0f>(bits[2 + i], bits[6 + i]);  // 2 3 with 6 7
      }
      for (int i = 0; i < 2; ++i) {
        for (int first = 0; first < 2; ++first) {
          Bytes low = bits[4 * first + i], high = bits[4 * first + 2 + i];
          exchange<2, 0x33>(low, high);
          codes[4 * first + i] = low;
          codes[4 * first + 2 + i] = high;
        }
      }
    }
  }
  template <int Q> __attribute__((always_inline)) Bytes quad() const {
    if constexpr (kTogether) return codes[Q];
    return tile.template quad<Q>(half);
  }
};

// Calls with a tile's type: function(TileOf<Tile>{}).
template <typename Tile> struct TileOf { using type = Tile; };

template <int Bits, typename Function> inline void with_tile(const Matrix& w, Function&& function) {
  if constexpr (Bits > 2) {
    if (w.apart) return function(TileOf<ApartTile<Bits>>{});
  }
  function(TileOf<PackedTile<Bits>>{});
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

template <typename Tile, typename Decoder>
inline void expand_levels(Tile tile, int64_t tiles, const Decoder& decoder, uint8_t* out) {
  for (; tiles > 0; --tiles, tile.next()) {
    for (int half = 0; half < 2; ++half, out += 512) {
      const HalfTile<Tile> codes(tile, half);
      repeat<8>([&]<int Q>() __attribute__((always_inline)) {
        store_bytes(out + 64 * Q, decoder.of(codes.template quad<Q>()));
      });
    }
  }
}

template <int Bits>
inline void expand_levels(const Matrix& w, int64_t panel, int64_t begin, int64_t end, const int8_t* digits, uint8_t* out) {
  with_tile<Bits>(w, [&]<typename Tile>(TileOf<Tile>) {
    expand_levels(Tile(w, panel, begin), end - begin, Levels<Bits>(digits), out);
  });
}

// Levels of tiles [begin, end) of a panel: 1024 bytes a tile, quad after quad. `digits` is w.high or w.low.
void expand_levels(const Matrix& w, int64_t panel, int64_t begin, int64_t end, const int8_t* digits, uint8_t* out) {
  switch (w.bits) {
    case 2: return expand_levels<2>(w, panel, begin, end, digits, out);
    case 3: return expand_levels<3>(w, panel, begin, end, digits, out);
    case 4: return expand_levels<4>(w, panel, begin, end, digits, out);
    case 5: return expand_levels<5>(w, panel, begin, end, digits, out);
    case 6: return expand_levels<6>(w, panel, begin, end, digits, out);
    case 7: return expand_levels<7>(w, panel, begin, end, digits, out);
    case 8:
      if (w.direct) return expand_levels(PackedTile<8>(w, panel, begin), end - begin, DirectLevels(digits), out);
      return expand_levels<8>(w, panel, begin, end, digits, out);
  }
}

// The codes themselves, for plain levels.
template <int Bits> inline void expand_codes(const Matrix& w, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
  expand_levels(PackedTile<Bits>(w, panel, begin), end - begin, PlainLevels<Bits>(nullptr), out);
}

void expand_codes(const Matrix& w, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
  switch (w.bits) {
    case 2: return expand_codes<2>(w, panel, begin, end, out);
    case 3: return expand_codes<3>(w, panel, begin, end, out);
    case 4: return expand_codes<4>(w, panel, begin, end, out);
    case 5: return expand_codes<5>(w, panel, begin, end, out);
    case 6: return expand_codes<6>(w, panel, begin, end, out);
    case 7: return expand_codes<7>(w, panel, begin, end, out);
  }
}

// Weights of tiles [begin, end) of a panel as floats, [column][16 rows]: codebook * scale (+ offset), each rounded, as
// formats/quant_tensor.py defines them.
template <typename Tile>
inline void expand_floats(Tile tile, const Matrix& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  constexpr int Bits = Tile::kBits;
  const int quads = w.segment / 4;
  BlockWalk walk(w, begin * kbit::kTileColumns);
  alignas(64) uint8_t codes[1024];
  for (int64_t t = begin; t < end; ++t, tile.next()) {
    for (int half = 0; half < 2; ++half) {
      const HalfTile<Tile> all(tile, half);
      repeat<8>([&]<int Q>() __attribute__((always_inline)) {
        const Bytes code = all.template quad<Q>();
        store_bytes(codes + half * 512 + 64 * Q, and_bits(code, uint8_t((1 << Bits) - 1)));
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

template <int Bits>
inline void expand_floats(const Matrix& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  with_tile<Bits>(w, [&]<typename Tile>(TileOf<Tile>) { expand_floats(Tile(w, panel, begin), w, panel, begin, end, out); });
}

}  // namespace
