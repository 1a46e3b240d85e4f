// Scores: queries against a chunk of keys, 16 slots to a vector. The sum over features runs in ascending order whatever
// the tile, so a score does not depend on what is computed beside it.
#pragma once

#include "attention/attention_rows.h"
#include "simd/repeat.h"

namespace {

using kbit::kChunk;
using kbit::kChunkPages;
using kbit::kPageBlocks;
using kbit::kRowTile;

// Accumulators a tile may hold. The matmul keeps integer and float sums at once; here there is only one kind.
constexpr int kSums = kTileRows * kTilePanels >= 12 ? 16 : kTileRows * kTilePanels >= 4 ? 4 : 2;
constexpr int kRows = kSums >= 16 ? kRowTile : kSums >= 4 ? 2 : 1;

// Vectors per row of a tile of R rows: a power of two.
constexpr int tile_width(int rows) {
  int width = 1;
  while (2 * width * rows <= kSums && width < 8) width *= 2;
  return width;
}

template <int N> struct Index { static constexpr int value = N; };

inline Floats load_element(const float* p) { return load(p); }
inline Floats load_element(const uint16_t* p) { return load_half(p); }

// A chunk's keys, and queries from some row on.
template <class Element> struct FloatKeys {
  const Element* keys[kChunkPages];  // (blocks, D, 16)
  int64_t block_stride;              // elements
  int head_dim;
  const float* queries;  // (R, padded)
  int padded;
  bool onto;  // adds to scores there are

  const Element* at(int block) const { return keys[block / kPageBlocks] + block % kPageBlocks * block_stride; }
};

// scores (R, kChunk) of blocks [block, block + V).
template <int R, int V, class Element>
void score_tile(const FloatKeys<Element>& t, int block, float* scores) {
  const Element* k[V];
  for (int v = 0; v < V; ++v) k[v] = t.at(block + v);
  Floats sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = t.onto ? load(scores + r * kChunk + 16 * (block + v)) : zero();
  for (int d = 0; d < t.head_dim; ++d) {
    Floats key[V];
    for (int v = 0; v < V; ++v) key[v] = load_element(k[v] + 16 * d);
    for (int r = 0; r < R; ++r) {
      const Floats q = broadcast(t.queries[r * t.padded + d]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(q, key[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores + r * kChunk + 16 * (block + v), sum[r][v]);
}

// The same for codes: bytes (blocks, quads of features, 16 slots, 4) and scales per block (groups, 16).
struct CodeKeys {
  const uint8_t* bytes[kChunkPages];
  int64_t block_stride;  // bytes
  const uint8_t* scales[kChunkPages];
  int64_t scale_stride;  // bytes
  int group, groups;
  float unit;          // 2 for codes, 1 for levels
  const int8_t* codes;  // (R, padded), the queries
  int padded;
  const float* query_scales;  // (R, groups), as the others
  const float* offsets;
  const int32_t* starts;

  const uint8_t* at(int block) const { return bytes[block / kPageBlocks] + block % kPageBlocks * block_stride; }
  const uint16_t* scales_at(int block) const {
    return reinterpret_cast<const uint16_t*>(scales[block / kPageBlocks] + block % kPageBlocks * scale_stride);
  }
};

// With codes c of a key and x of a query, a group's sum of (2 c + 1 - 2^bits) x is 2 sum(c x) + (1 - 2^bits) sum(x):
// codes go into the integer dot product as they are. 8-bit keys are levels already, 4-bit ones when unpacked; where the dot product wants them
// biased (kLevelBias), its sum starts at minus what the bias adds.
template <int R, int V> void score_tile(const CodeKeys& t, int block, float* scores) {
  Floats total[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = zero();
  const uint8_t* bytes[V];
  for (int v = 0; v < V; ++v) bytes[v] = t.at(block + v);
  for (int g = 0; g < t.groups; ++g) {
    Ints sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = broadcast(t.starts[r * t.groups + g]);
    for (int i = g * t.group; i < (g + 1) * t.group; i += 4) {
      Bytes key[V];
      for (int v = 0; v < V; ++v) key[v] = load_bytes(bytes[v] + 16 * i);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = dot4(sum[r][v], key[v], t.codes + r * t.padded + i);
    }
    for (int v = 0; v < V; ++v) {
      const Floats scale = load_half(t.scales_at(block + v) + 16 * g);
      for (int r = 0; r < R; ++r) {
        const Floats product = fma(to_float(sum[r][v]), broadcast(t.unit), broadcast(t.offsets[r * t.groups + g]));
        total[r][v] = fma(product, mul(scale, broadcast(t.query_scales[r * t.groups + g])), total[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores + r * kChunk + 16 * (block + v), total[r][v]);
}

// All blocks [begin, end), as wide as they go.
template <int R, int V, class Keys> inline void score_blocks(const Keys& t, int begin, int end, float* scores) {
  int block = begin;
  for (; block + V <= end; block += V) score_tile<R, V>(t, block, scores);
  if constexpr (V > 1) {
    if (block < end) score_blocks<R, V / 2>(t, block, end, scores);
  }
}

// R rows of scores; the integer tiles hold two kinds of sums.
template <int R, class Element> void score(const FloatKeys<Element>& t, int begin, int end, float* scores) {
  score_blocks<R, tile_width(R)>(t, begin, end, scores);
}
template <int R> void score(const CodeKeys& t, int begin, int end, float* scores) {
  score_blocks<R, tile_width(R) >= 4 ? tile_width(R) / 2 : tile_width(R)>(t, begin, end, scores);
}

// -------------------------------------------------------------------------------------------------- unpacking keys

// One block of key codes to one byte a code, as score_tile reads them: (quads, 16, 4). Writes up to 7 quads too many.
template <int Width> void unpack_key_block(const uint8_t* block, int quads, uint8_t* out) {
  for (int quad = 0; quad < quads; quad += 8 / Width, block += 64) {
    const Bytes packed = load_bytes(block);
    repeat<8 / Width>([&]<int F>() __attribute__((always_inline)) {
      store_bytes(out + 64 * (quad + F), and_bits(shift<F * Width>(packed), (1 << Width) - 1));
    });
  }
}

// The same to levels, plus kLevelBias.
void unpack_key_block_4(const uint8_t* block, int quads, uint8_t* out) {
  uint8_t entries[16];
  for (int code = 0; code < 16; ++code) entries[code] = uint8_t(kbit::kKeptLevels[code] + kLevelBias);
  const Table<4> levels = make_table<4>(entries);
  for (int quad = 0; quad < quads; quad += 2, block += 64) {
    const Bytes packed = load_bytes(block);
    store_bytes(out + 64 * quad, lookup(levels, and_bits(packed, 15)));
    store_bytes(out + 64 * (quad + 1), lookup(levels, and_bits(shift<4>(packed), 15)));
  }
}

void unpack_key_block_3(const uint8_t* block, int quads, uint8_t* out) {
  const uint8_t* top_plane = block + (quads + 3) / 4 * 64;
  for (int quad = 0; quad < quads; quad += 8) {
    const Bytes top = load_bytes(top_plane + quad * 8);
    const Bytes low[2] = {load_bytes(block + quad * 16), load_bytes(block + quad * 16 + (quad + 4 < quads ? 64 : 0))};
    repeat<8>([&]<int F>() __attribute__((always_inline)) {
      const Bytes code = select_bits(3, shift<F % 4 * 2>(low[F / 4]), shift<F - 2>(top));
      store_bytes(out + 64 * (quad + F), and_bits(code, 7));
    });
  }
}

// Blocks [begin, end) of a page's keys, to out + (block - begin) * stride bytes. values: block 0 of the values that
// come next, or null.
void unpack_keys(const CacheView& c, const uint8_t* keys, int64_t begin, int64_t end, uint8_t* out, int64_t stride,
                 const uint8_t* values) {
  const int quads = c.head_dim / 4;
  for (int64_t b = begin; b < end; ++b, out += stride) {
    const uint8_t* block = keys + b * c.key_block;
    // Hardware follows a strip's streams, but begins anew every 4 KiB and at every turn from keys to values.
    if (values) prefetch_bytes(values + b * c.value_block, c.value_block);
    if (c.key_bits == 16) {
      for (int64_t i = 0; i < 16 * c.head_dim; i += 16) {
        store(reinterpret_cast<float*>(out) + i, load_half(reinterpret_cast<const uint16_t*>(block) + i));
      }
    } else if (c.key_bits == 8) {
      for (int64_t i = 0; i < 64 * quads; i += 64) store_bytes(out + i, xor_bits(load_bytes(block + i), kLevelBias));
    } else if (c.key_bits == 4) {
      unpack_key_block_4(block, quads, out);
    } else if (c.key_bits == 3) {
      unpack_key_block_3(block, quads, out);
    } else {
      unpack_key_block<2>(block, quads, out);
    }
  }
}

}  // namespace
