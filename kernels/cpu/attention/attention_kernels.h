// Attention over the KV cache: what one instruction set offers, and the plain structs its functions take. No standard
// library here: this is included where each instruction set is compiled.
#pragma once

#include <cstdint>

namespace kbit {

class KVPages;

// Tokens of one sequence lie in slots; 16 slots are a block of the cache's layout, 64 a page of memory. Softmax is taken
// over chunks of slots at absolute positions and chunks are combined in ascending order, in every kind of pass: that is
// what makes a token's result the same bits however the work is cut, and wherever its pages lie.
constexpr int kSlots = 16, kPage = 64, kChunk = 128;
constexpr int kPageBlocks = kPage / kSlots, kChunkPages = kChunk / kPage;
constexpr int kRowTile = 4;  // rows (token, head) that share one pass over a chunk, at most

// The levels of 4-bit codes, reference.LEVELS_4; codes of 3 and 2 bits have equal steps, those of 8 are levels.
constexpr std::int8_t kKeptLevels[16] = {-127, -100, -79, -62, -48, -34, -22, -9, 3, 15, 28, 42, 56, 73, 93, 122};

// Where pages keep the things of one layer; kv_pages.h draws it. Sizes in bytes.
struct CacheView {
  int key_bits, value_bits;  // 32 and 16: floats, the same for both; 8, 4, 3, 2: codes
  int head_dim;  // D
  int padded;    // D up to a multiple of 16
  int group;     // features that share a scale, and are rotated together; the padded head for floats
  int groups;
  int kv_heads;
  bool latent;   // keys are all there is: values are the keys as they are kept, turned
  std::int64_t key_codes;    // codes (or floats) of one block of keys; its scales follow
  std::int64_t key_block;    // the whole block
  std::int64_t value_codes;
  std::int64_t value_block;
  std::int64_t strip;        // one head of the layer in a page: its blocks of keys, then its blocks of values
  std::int64_t offset;       // of the layer in a page
  std::uint8_t* const* pages;  // by id
};

static inline std::uint8_t* keys_of(const CacheView& c, std::int64_t page, std::int64_t head) {
  return c.pages[page] + c.offset + head * c.strip;
}
static inline std::uint8_t* values_of(const CacheView& c, std::uint8_t* keys) { return keys + kPageBlocks * c.key_block; }

// One attention of a pass: rotate q and k, write k and v into the cache, attend. R rows are the pass's new tokens.
struct AttentionArgs {
  const float* q;  // (R, heads * D)
  const float* k;  // (R, kv_heads * D)
  const float* v;  // not read where the cache has no values of its own
  float* out;  // (R, heads * D), none of the above
  std::int64_t q_stride, k_stride, v_stride, out_stride;  // floats per row
  std::int64_t rows;
  const std::int32_t* sequence;  // (R), row of the block table; a sequence's rows are consecutive and ascend by one
  const std::int32_t* position;  // (R), slot of the token
  const std::int32_t* last;      // (R), the last slot a row sees where it may look ahead; null: its own
  const float* cos;              // (P, rotated_half), rows angle_stride floats apart
  const float* sin;
  std::int64_t angle_stride;
  const std::int32_t* rope_row;  // (R), row of cos and sin
  int rotated_half;              // pairs (i, i + rotated_half) turn, features from 2 * rotated_half on do not
  // Where codes of keys leave out a constant that every key has before it is turned; else null. See prepare_query.
  const float* key_bias;         // (kv_heads * D)
  const float* angles;           // (positions / 16, 2 * rotated_half, 16): cosines, then sines, a slot to a lane
  int heads, kv_heads, head_dim;
  float scale;
  float soft_cap;  // c: scores s become c tanh(s / c); 0: they stay
  const float* sinks;  // (heads), a score of each that is in the softmax's sum beside those of slots; null: none
  int window;  // slots a token sees at most, itself included, before it and, where it looks ahead, after it; 0: all
  bool chunked;  // the window stays: a token sees the slots of its own stretch of `window` up to itself
  // What is added to scores by distance, in units of log2: (heads, 2 * reach + 1), for a key's slot less its query's, cut
  // to -reach .. reach. Null: nothing.
  const float* by_distance;
  int reach;
  const KVPages* cache;
  const std::int32_t* tables;    // (B, table_stride): the pages of each sequence, in order
  std::int64_t table_stride;
  int layer;
};

// Keys of a sequence's page number `index`, for one head.
static inline std::uint8_t* keys_at(const AttentionArgs& a, const CacheView& c, std::int64_t sequence,
                                    std::int64_t index, std::int64_t head) {
  return keys_of(c, a.tables[sequence * a.table_stride + index], head);
}

// First and last slot that a row's token sees.
static inline std::int64_t first_seen(const AttentionArgs& a, std::int64_t row) {
  const std::int64_t position = a.position[row];
  if (a.chunked) return position - position % a.window;
  return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}
static inline std::int64_t last_seen(const AttentionArgs& a, std::int64_t row) {
  if (!a.last) return a.position[row];
  const std::int64_t last = a.last[row], ahead = std::int64_t{a.position[row]} + a.window - 1;
  return a.window > 0 && ahead < last ? ahead : last;
}

// Where chunk results wait when several tasks share a row: (kv_heads, R, heads of a group, chunks).
struct Partials {
  float* maxima;   // largest score
  float* sums;     // sum of 2^(score - largest)
  float* outputs;  // (padded): the values, weighted alike
  std::int64_t chunks;
};

// Some rows of one sequence, the query heads of one key/value head, some chunks.
struct AttentionTask {
  const AttentionArgs* args;
  const CacheView* cache;
  const Partials* partials;  // null: the task has all chunks and writes `out`
  std::int64_t first_row, rows;
  std::int64_t chunk_begin, chunk_end;
  int kv_head;
  float* scratch;  // TaskMemory::total floats, 64-byte aligned
};

// A task's scratch: offsets in floats, each a multiple of 16. M rows of (token, head).
struct TaskMemory {
  std::int64_t queries;        // (M, padded) floats, or int8 codes; and one query more
  std::int64_t query_scales;   // (M, groups)
  std::int64_t query_offsets;  // (M, groups): see score_tile
  std::int64_t query_starts;   // (M, groups) int32
  std::int64_t query_turns;    // (M, padded): what cosines and sines are multiplied by
  std::int64_t keys;           // a chunk's keys, unpacked: (kChunk / 16, D, 16) floats, or bytes
  std::int64_t values;         // (kChunk, padded)
  std::int64_t weights;        // (kRowTile, kChunk)
  std::int64_t scaled;         // (kRowTile, groups, kChunk): weights times a value group's scales
  std::int64_t maxima, sums;   // (M)
  std::int64_t outputs;        // (M, padded)
  std::int64_t total;
};

static inline TaskMemory task_memory(std::int64_t m, std::int64_t head_dim, std::int64_t padded, std::int64_t groups) {
  TaskMemory t{};
  std::int64_t next = 0;
  const auto take = [&next](std::int64_t floats) {
    const std::int64_t at = next;
    next += (floats + 15) / 16 * 16;
    return at;
  };
  t.queries = take((m + 1) * padded);
  t.query_scales = take(m * groups);
  t.query_offsets = take(m * groups);
  t.query_starts = take(m * groups);
  t.query_turns = take(m * padded);
  t.keys = take(kChunk * (head_dim + 32));
  t.values = take(kChunk * padded);
  t.weights = take(kRowTile * kChunk);
  t.scaled = take(kRowTile * groups * kChunk);
  t.maxima = take(m);
  t.sums = take(m);
  t.outputs = take(m * padded);
  t.total = next + 16 * 16;  // and what is read past the end, never used
  return t;
}

struct AttentionKernels {
  // Rotates and writes keys and values of rows [first_row, first_row + rows), all of one sequence. Calls for the same
  // 16 slots must not run at once. scratch: as of a task.
  void (*append)(const AttentionArgs&, const CacheView&, std::int64_t first_row, std::int64_t rows, int kv_head,
                 float* scratch);
  void (*attend)(const AttentionTask&);
  // Combines the chunks of one row and query head into `out`. scratch: `padded` floats.
  void (*combine)(const AttentionArgs&, const CacheView&, const Partials&, std::int64_t row, int head, float* scratch);
};

}  // namespace kbit
