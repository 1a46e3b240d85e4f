// A weight matrix as the kernels read it: prepared once at load from the portable layout on disk.
//
// Rows are taken 16 at a time. Such a *panel* is a stream along K, cut into tiles of 64 columns; in a tile, four
// consecutive columns of all 16 rows make a *quad* of 64 weights, the unit of one dot-product instruction (vpdpbusd,
// sdot: 4 products per 32-bit lane), and the layout AMX wants its B tiles in:
//
//     quad q:   row 0: k k+1 k+2 k+3 | row 1: k k+1 k+2 k+3 | ... | row 15: k k+1 k+2 k+3        k = 4 q
//
// So one value of x, four columns wide, is broadcast against 16 rows, sums stay in their lanes, and nothing is added
// across lanes. Codes of k bits are kept as bit planes of widths 4, 2 and 1 (8 alone), as on disk, but plane by plane
// within half a tile, so that shifting a whole 64-byte vector yields one quad's codes:
//
//     half a tile:   [ plane of the widest width | next | .. ]                   8 quads, 64 * bits bytes
//     plane of width w:   vector v, bits f*w .. f*w+w-1 of every byte  =  the codes of quad v * (8/w) + f
//
//     4 bits:   byte b of vector 0:   hhhh llll     llll: quad 0, byte b     hhhh: quad 1, byte b
//     3 bits:   2 vectors of 2 bits (4 quads each), then 1 vector of 1 bit (8 quads)
//
// Half a tile is the least that fills a vector of one bit, and what the kernels decode at a time: whatever the width, they
// read memory from front to back, which is what its hardware prefetchers are made for.
//
// Nested codes (formats/nested.py) keep their planes apart, so that fewer bits are fewer bytes: `codes` is a stream of 2-bit
// codes as above, and each further bit has a stream of its own, of a plane of one bit:
//
//     stream of one bit:   [panel][tile][half] vector of 64 bytes        bit f of every byte = that bit of quad f
//
// Scales, and offsets where the format has them, lie beside: 16 per panel and block, in the order they are used.
// Where blocks of 16 or 32 columns share one fp32 number per 256 columns, as GGUF's K types do (scale = step * size with
// an integer step), they are kept so (Number::steps), which takes a quarter of fp32's bytes:
//
//     group of 256 columns of a panel:   16 fp32 sizes | 16 int8 steps of its first block | of the second | ..
//
// Columns beyond K and rows beyond N are code 0 with scale 0, so they add nothing.
//
// Trellises (kbit/formats/trellis.py) are kept tile by tile of 16 columns, 32 * bits bytes each. A row has `bits` words of
// 16 bits; two words of all rows are a vector (the earlier one in a lane's upper half), the last of an odd number half a
// one. With half a bit more a row has one byte more, and those of all rows come last. Their scales are fp16, one a row. Values of x beyond K are 0 there.
//
// Where columns are rotated (mixed > 0), so must x be: rotation[k] x[k], then Hadamard matrices over `mixed` columns each.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace kbit {

constexpr int kPanelRows = 16;    // rows of a panel
constexpr int kTileColumns = 64;  // columns of a tile
constexpr int kStepColumns = 256;  // columns of a group of stepped scales
constexpr int kTileWeights = kPanelRows * kTileColumns;
constexpr int kFurtherBits = 6;  // beyond two

// What codes stand for: values of a codebook, or (trellises) sums of the bytes of a product, of two bytes or of four.
enum class Code : std::uint8_t { planes, sum2, sum4 };

// How numbers are stored: in 16 or 32 bits each or, scales only, as steps.
enum class Number : std::uint8_t { half, bfloat, single, steps };

// Of a number that is stored by itself.
inline int bytes_of(Number kind) { return kind == Number::single ? 4 : 2; }

// A matrix (N, K), quantized (bits 2 to 8) or dense (bits 0: `values` holds [panel][k][16 rows]).
// Plain data, so that kernels of every instruction set can read it; MatrixStorage owns the memory.
struct Matrix {
  std::int64_t rows = 0, columns = 0;   // N, K
  std::int64_t panels = 0, tiles = 0;   // ceil(N / 16), ceil(K / 64)
  int bits = 0;

  // Dense.
  const void* values = nullptr;
  Number value_kind = Number::single;

  // Quantized.
  const std::uint8_t* codes = nullptr;  // [panel][tile][128 * bits bytes], 64-byte aligned; apart: [panel][tile][256]
  bool apart = false;                   // bits 3 and up have streams of their own
  const std::uint8_t* further[kFurtherBits] = {};  // [panel][tile][128], of code bits 2, 3, ..
  const void* scales = nullptr;         // [panel][block][16 rows]
  const void* offsets = nullptr;        // the same, or null
  Number scale_kind = Number::half;
  // Number::steps: scales and offsets are [panel][group], of kStepColumns columns and 1 << group_shift blocks each.
  int group_shift = 0;
  std::int64_t groups = 0, group_bytes = 0;
  std::int64_t block = 0;               // columns per scale, a multiple of segment; the whole padded row if one per row
  std::int64_t blocks = 0;              // scales per row
  // Columns whose products are summed as integers: 64, 32 or 16, the largest that divides the block. x is quantized to
  // int8 with one scale per segment.
  int segment = kTileColumns;
  const float* codebook = nullptr;      // 2^bits values
  // The codebook in int8: codebook[c] = level_scale * (high[c] + low[c] / kLowSteps), nearly. `low` is used, at the
  // price of a second dot product, where 8 bits are too coarse beside the format's own error (two_digits).
  const std::int8_t* high = nullptr;    // 2^bits, within [-128, 127]
  const std::int8_t* low = nullptr;
  float level_scale = 1.0f;
  bool two_digits = false;
  Code code = Code::planes;
  bool half = false;                    // of a trellis: half a bit more
  std::int32_t window_mask = 0;         // of a trellis: 2^L - 1
  std::int64_t mixed = 0;               // columns that one Hadamard matrix mixes, a power of two; 0: not rotated
  const float* rotation = nullptr;      // (K up to the next multiple of 16): a sign / sqrt(mixed)
  // Weights that are kept apart from codes, by their rows, and added to what these stand for.
  std::int64_t outliers = 0;
  const std::int32_t* outlier_rows = nullptr;     // ascending
  const std::int32_t* outlier_columns = nullptr;
  const float* outlier_values = nullptr;
  const std::int32_t* panel_of = nullptr;  // of a selection: which panel of the whole, whose rows outliers have, is here
  bool direct = false;                  // 8 bits, and level = code - 128: no lookup needed
  bool plain = false;                   // up to 7 bits, and level = code - zero: no lookup either
  std::int32_t zero = 0;

  // Whether both take an input in one form: at least one takes it as it is, or both rotate it alike.
  bool shares_input(const Matrix& other) const {
    if (!mixed || !other.mixed) return true;
    if (mixed != other.mixed || columns != other.columns) return false;
    return std::equal(rotation, rotation + (columns + 15) / 16 * 16, other.rotation);
  }
  // Of all bits of a code, wherever they lie.
  std::int64_t tile_bytes() const { return kTileWeights / 16 * (2 * bits + half); }
  std::int64_t panel_bytes() const { return tiles * tile_bytes(); }
};

constexpr int kLowSteps = 250;  // the low digit is within [-125, 125]

}  // namespace kbit
