// Attention of one task: some tokens of a sequence, the query heads that share one key/value head, some chunks.
//
// The arithmetic of a (token, head), the same in every kind of pass:
//   for each chunk that holds a slot it sees, in ascending order:
//     s[j] = q . k[j], features in ascending order       (q includes scale and log2(e))
//     m' = max s,  p[j] = 2^(s[j] - m'),  l' = sum p      (hidden slots: p = 0)
//     o' = sum p[j] v[j], slots in ascending order
//     m = max(m, m'),  l = l 2^(m_old - m) + l' 2^(m' - m),  o likewise
//   where the head has a sink t (times log2(e)):  l = l + 2^(t - m), by way of the larger of t and m
//   out = o / l, un-rotated where the cache rotates
// Passes differ in who computes a chunk (split: results wait in Partials for `combine`) and in what is shared: the keys
// and values of a chunk are unpacked once for all rows of a task, or read as they are for one token's few heads.
#pragma once

#include "attention/attention_softmax.h"
#include "attention/attention_values.h"
#include "program/elementary.h"

namespace {

using kbit::AttentionTask;
using kbit::Partials;
using kbit::TaskMemory;

constexpr float kLowest = -3.4028234663852886e38f;

// o / l to the result, un-rotated. largest: m.
void finish_row(const AttentionArgs& a, const CacheView& c, int head, float* outputs, float largest, float sum, float* out) {
  if (a.sinks) {
    const ChunkSoftmax sink = {a.sinks[head] * 1.44269504088896341f, 1.0f};
    float keep, add;
    combine_chunks(&largest, &sum, &sink, 1, &keep, &add);
    for (int d = 0; d < c.padded; d += 16) store(outputs + d, mul(load(outputs + d), broadcast(keep)));
  }
  const Floats divisor = broadcast(sum);
  for (int d = 0; d < c.padded; d += 16) store(outputs + d, div(load(outputs + d), divisor));
  if (c.value_bits < 16) hadamard(outputs, c.head_dim, c.group);
  copy_head(outputs, c.head_dim, out);
}

// One chunk as a task's tiles read it.
struct Chunk {
  int64_t index, start;  // start: its first slot
  // Of each page, block 0:
  const uint8_t* keys[kChunkPages];  // floats, halves or bytes, by `direct` and bits
  int64_t key_stride;                // bytes
  const uint8_t* key_scales[kChunkPages];
  const void* values[kChunkPages];
  const uint8_t* value_scales[kChunkPages];
  const uint8_t* next_keys[kChunkPages];  // of the next chunk, in the cache
};
static_assert(kChunkPages == 2, "a chunk's pages are written out one by one");

struct TaskState {
  const AttentionTask* task;
  const CacheView* cache;
  Queries queries;
  bool direct;
  float* scores;  // (kRowTile, kChunk)
  float* scaled;  // (kRowTile, groups, kChunk)
  float* maxima;
  float* sums;
  float* outputs;
};

template <int R, class Element>
inline void score_floats(const TaskState& s, const Chunk& chunk, int64_t m, int begin, int end) {
  const CacheView& c = *s.cache;
  const FloatKeys<Element> keys{
      {reinterpret_cast<const Element*>(chunk.keys[0]), reinterpret_cast<const Element*>(chunk.keys[1])},
      chunk.key_stride / int64_t(sizeof(Element)), c.head_dim, s.queries.floats + m * c.padded, c.padded, false};
  score<R>(keys, begin, end, s.scores);
}

// Onto the scores of codes, what the keys' constant part adds.
template <int R> void add_constant(const TaskState& s, const Chunk& chunk, int64_t m, int begin, int end) {
  const AttentionArgs& a = *s.task->args;
  const int features = 2 * a.rotated_half;
  const int64_t block = int64_t(16) * features;
  const float* angles = a.angles + chunk.start / kSlots * block;
  const FloatKeys<float> keys{{angles, angles + kPageBlocks * block}, block, features,
                              s.queries.turns + m * s.cache->padded, s.cache->padded, true};
  score<R>(keys, begin, end, s.scores);
}

template <int R> void score_rows(const TaskState& s, const Chunk& chunk, int64_t m, int begin, int end) {
  const CacheView& c = *s.cache;
  if (c.key_bits < 16) {
    const int64_t g = m * c.groups;
    const CodeKeys keys{{chunk.keys[0], chunk.keys[1]},
                        chunk.key_stride,
                        {chunk.key_scales[0], chunk.key_scales[1]},
                        c.key_block,
                        c.group,
                        c.groups,
                        keys_are_levels(c) ? 1.0f : 2.0f,
                        s.queries.codes + m * c.padded,
                        c.padded,
                        s.queries.scales + g,
                        s.queries.offsets + g,
                        s.queries.starts + g};
    score<R>(keys, begin, end, s.scores);
    if (s.task->args->key_bias) add_constant<R>(s, chunk, m, begin, end);
  } else if (c.key_bits == 16 && s.direct) {
    score_floats<R, uint16_t>(s, chunk, m, begin, end);
  } else {
    score_floats<R, float>(s, chunk, m, begin, end);
  }
}

// Scores of blocks [begin, end), in units of log2, capped.
template <int R> void cap_scores(const TaskState& s, int begin, int end) {
  const float cap = s.task->args->soft_cap * 1.44269504088896341f;
  for (int r = 0; r < R; ++r) {
    for (int b = begin; b < end; ++b) {
      float* at = s.scores + r * kChunk + b * kSlots;
      store(at, soft_capped(load(at), cap));
    }
  }
}

// Onto the scores, what their slots' distances from the rows' tokens add.
template <int R> void add_by_distance(const TaskState& s, const Chunk& chunk, int64_t m, const int* begin, const int* end) {
  const AttentionArgs& a = *s.task->args;
  const int group = a.heads / a.kv_heads;
  for (int r = 0; r < R; ++r) {
    const int64_t head = s.task->kv_head * group + (m + r) % group;
    const float* table = a.by_distance + head * (2 * a.reach + 1) + a.reach;
    const int64_t position = a.position[s.task->first_row + (m + r) / group];
    for (int j = begin[r]; j < end[r]; ++j) {
      const int64_t distance = chunk.start + j - position;
      s.scores[r * kChunk + j] += table[distance < -a.reach ? -a.reach : distance > a.reach ? a.reach : distance];
    }
  }
}

// Rows m .. m + R - 1 of the task against one chunk.
template <int R> void attend_tile(const TaskState& s, const Chunk& chunk, int64_t m) {
  const AttentionArgs& a = *s.task->args;
  const CacheView& c = *s.cache;
  const int group = a.heads / a.kv_heads;
  int begin[R], end[R], lowest = kChunk, highest = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t row = s.task->first_row + (m + r) / group;
    const int64_t first = first_seen(a, row) - chunk.start, last = last_seen(a, row) + 1 - chunk.start;
    begin[r] = int(first < 0 ? 0 : first > kChunk ? kChunk : first);
    end[r] = int(last < 0 ? 0 : last > kChunk ? kChunk : last);
    if (begin[r] >= end[r]) continue;
    lowest = begin[r] < lowest ? begin[r] : lowest;
    highest = end[r] > highest ? end[r] : highest;
  }
  if (lowest >= highest) return;
  const int first = lowest / kSlots, last = (highest + kSlots - 1) / kSlots;
  score_rows<R>(s, chunk, m, first, last);
  if (a.soft_cap > 0.0f) cap_scores<R>(s, first, last);
  if (a.by_distance) add_by_distance<R>(s, chunk, m, begin, end);

  ChunkSoftmax results[R];
  float keep[R], add[R];
  for (int r = 0; r < R; ++r) {
    results[r] = {kLowest, 0.0f};
    if (begin[r] < end[r]) results[r] = softmax_chunk(s.scores + r * kChunk, begin[r], end[r]);
  }
  if (!s.task->partials) combine_chunks(s.maxima + m, s.sums + m, results, R, keep, add);
  for (int r = 0; s.task->partials && r < R; ++r) {
    s.maxima[(m + r) * s.task->partials->chunks + chunk.index] = results[r].largest;
    s.sums[(m + r) * s.task->partials->chunks + chunk.index] = results[r].sum;
  }

  ValueTile tile{{chunk.values[0], chunk.values[1]},
                 c.value_block,
                 c.padded,
                 c.group,
                 1,
                 s.scores,
                 begin,
                 end,
                 nullptr,
                 0,
                 keep,
                 add,
                 {chunk.next_keys[0], chunk.next_keys[1]},
                 c.key_block};
  const int64_t scale_stride = c.latent ? c.key_block : c.value_block;
  if (c.value_bits < 16) {  // the slots' scales go into the weights
    for (int b = first; b < last; ++b) {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(chunk.value_scales[b / kPageBlocks] +
                                                                 b % kPageBlocks * scale_stride);
      for (int g = 0; g < c.groups; ++g) {
        const Floats scale = load_half(scales + g * kSlots);
        for (int r = 0; r < R; ++r) {
          store(s.scaled + int64_t(r * c.groups + g) * kChunk + b * kSlots,
                mul(load(s.scores + r * kChunk + b * kSlots), scale));
        }
      }
    }
    tile.weights = s.scaled;
    tile.groups = c.groups;
  }
  if (s.task->partials) {
    tile.out_stride = s.task->partials->chunks * c.padded;
    tile.out = s.outputs + m * tile.out_stride + chunk.index * c.padded;
    tile.keep = nullptr;
  } else {
    tile.out_stride = c.padded;
    tile.out = s.outputs + m * c.padded;
  }
  weigh<R>(tile, c.value_bits, s.direct);
}

void attend_rows(const TaskState& s, const Chunk& chunk, int64_t m, int64_t end) {
  for (; m + kRows <= end; m += kRows) attend_tile<kRows>(s, chunk, m);
  if constexpr (kRows > 3) if (end - m == 3) return attend_tile<3>(s, chunk, m);
  if constexpr (kRows > 2) if (end - m == 2) return attend_tile<2>(s, chunk, m);
  if constexpr (kRows > 1) if (end - m == 1) return attend_tile<1>(s, chunk, m);
}

// A task's place in a chunk: unpacked into scratch for many rows, in the cache for few.
Chunk open_chunk(const TaskState& s, const TaskMemory& memory, int64_t index, int64_t sequence) {
  const AttentionTask& t = *s.task;
  const AttentionArgs& a = *t.args;
  const CacheView& c = *s.cache;
  const int64_t start = index * kChunk;
  const int64_t seen_from = first_seen(a, t.first_row) - start;
  const int64_t seen_to = last_seen(a, t.first_row + t.rows - 1) + 1 - start;
  const int64_t begin = seen_from > 0 ? seen_from / kSlots : 0;  // blocks within the chunk
  const int64_t end = seen_to < kChunk ? (seen_to + kSlots - 1) / kSlots : kChunk / kSlots;
  Chunk chunk{};
  chunk.index = index;
  chunk.start = start;
  chunk.key_stride = c.key_block;
  // Pages that no row sees may not exist: theirs are the addresses of one that does, and are never read. What would
  // come after the last token's page neither.
  const int64_t last_page = last_seen(a, t.first_row + t.rows - 1) / kPage;
  const auto page_at = [&](int64_t number) {
    return keys_at(a, c, sequence, number < last_page ? number : last_page, t.kv_head);
  };
  for (int p = 0; p < kChunkPages; ++p) {
    uint8_t* keys = page_at(index * kChunkPages + p);
    const uint8_t* values = values_of(c, keys);
    chunk.keys[p] = keys;
    chunk.key_scales[p] = keys + c.key_codes;
    chunk.values[p] = values;
    chunk.value_scales[p] = c.latent ? chunk.key_scales[p] : values + c.value_codes;
    chunk.next_keys[p] = page_at((index + 1) * kChunkPages + p);
  }
  const bool unpack_keys_too = c.key_bits < 8 || (c.key_bits == 8 && kLevelBias != 0) || (c.key_bits == 16 && !s.direct);
  const bool unpack_values_too = !c.latent && c.value_bits != 32 && !s.direct;
  if (unpack_keys_too) {
    chunk.key_stride = c.key_bits == 16 ? int64_t(64) * c.head_dim : int64_t(64) * ((c.head_dim / 4 + 7) / 8 * 8);
  }
  for (int p = 0; p < kChunkPages; ++p) {
    const int64_t from = begin > p * kPageBlocks ? begin - p * kPageBlocks : 0;  // blocks within the page
    const int64_t to = end < (p + 1) * kPageBlocks ? end - p * kPageBlocks : kPageBlocks;
    if (unpack_keys_too) {
      uint8_t* out = reinterpret_cast<uint8_t*>(t.scratch + memory.keys) + p * kPageBlocks * chunk.key_stride;
      const uint8_t* values = s.direct ? static_cast<const uint8_t*>(chunk.values[p]) : nullptr;
      unpack_keys(c, chunk.keys[p], from, to, out + from * chunk.key_stride, chunk.key_stride, values);
      chunk.keys[p] = out;
    }
    if (unpack_values_too) {
      float* out = t.scratch + memory.values + int64_t(p) * kPage * c.padded;
      unpack_values(c, static_cast<const uint8_t*>(chunk.values[p]), from, to, out + from * kSlots * c.padded);
      chunk.values[p] = out;
    }
    if (c.latent) {
      float* out = t.scratch + memory.values + int64_t(p) * kPage * c.padded;
      unpack_latents(c, chunk.keys[p], chunk.key_stride, from, to, out + from * kSlots * c.padded);
      chunk.values[p] = out;
    }
  }
  return chunk;
}

void attend(const AttentionTask& t) {
  const AttentionArgs& a = *t.args;
  const CacheView& c = *t.cache;
  const int group = a.heads / a.kv_heads;
  const int64_t m = t.rows * group;
  const TaskMemory memory = kbit::task_memory(m, c.head_dim, c.padded, c.groups);
  float* scratch = t.scratch;
  // One token's heads are few: its codes go straight into sums where groups are whole pairs of vectors. (Those that share
  // latents are many.)
  const bool direct = t.rows == 1 && !c.latent && (c.key_bits >= 16 || c.group == 32);
  TaskState s{&t, &c, {}, direct, scratch + memory.weights, scratch + memory.scaled, scratch + memory.maxima,
              scratch + memory.sums, scratch + memory.outputs};
  s.queries = {scratch + memory.queries, reinterpret_cast<int8_t*>(scratch + memory.queries),
               scratch + memory.query_scales, scratch + memory.query_offsets,
               reinterpret_cast<int32_t*>(scratch + memory.query_starts), scratch + memory.query_turns};
  if (c.key_bits < 16) s.queries.floats += m * c.padded;
  if (t.partials) {
    const int64_t first = (t.kv_head * a.rows + t.first_row) * group * t.partials->chunks;
    s.maxima = t.partials->maxima + first;
    s.sums = t.partials->sums + first;
    s.outputs = t.partials->outputs + first * c.padded;
  }
  for (int64_t i = 0; i < m; ++i) {
    if (i % group == 0 && i + group < m) {  // the next row's heads lie a stride away, where hardware does not look
      const int64_t row = t.first_row + i / group + 1, head = int64_t(t.kv_head) * group * a.head_dim;
      prefetch_bytes(a.q + row * a.q_stride + head, int64_t(group) * a.head_dim * 4);
      prefetch_bytes(a.out + row * a.out_stride + head, int64_t(group) * a.head_dim * 4);
    }
    prepare_query(a, c, t.first_row + i / group, t.kv_head * group + int(i % group), s.queries, i);
    if (t.partials) continue;
    s.maxima[i] = kLowest;
    s.sums[i] = 0.0f;
    for (int d = 0; d < c.padded; d += 16) store(s.outputs + i * c.padded + d, zero());
  }
  for (int64_t chunk = t.chunk_begin; chunk < t.chunk_end; ++chunk) {
    if ((chunk + 1) * kChunk <= first_seen(a, t.first_row)) continue;
    if (chunk * kChunk > last_seen(a, t.first_row + t.rows - 1)) break;
    attend_rows(s, open_chunk(s, memory, chunk, a.sequence[t.first_row]), 0, m);
  }
  if (t.partials) return;
  for (int64_t i = 0; i < m; ++i) {
    const int head = t.kv_head * group + int(i % group);
    finish_row(a, c, head, s.outputs + i * c.padded, s.maxima[i], s.sums[i],
               a.out + (t.first_row + i / group) * a.out_stride + int64_t(head) * a.head_dim);
  }
}

void combine(const AttentionArgs& a, const CacheView& c, const Partials& p, int64_t row, int head, float* scratch) {
  const int group = a.heads / a.kv_heads;
  const int64_t base = ((head / group * a.rows + row) * group + head % group) * p.chunks, last = last_seen(a, row);
  float largest = kLowest, sum = 0.0f;
  for (int d = 0; d < c.padded; d += 16) store(scratch + d, zero());
  for (int64_t chunk = first_seen(a, row) / kChunk; chunk <= last / kChunk; ++chunk) {
    const ChunkSoftmax result = {p.maxima[base + chunk], p.sums[base + chunk]};
    float keep, add;
    combine_chunks(&largest, &sum, &result, 1, &keep, &add);
    const float* outputs = p.outputs + (base + chunk) * c.padded;
    for (int d = 0; d < c.padded; d += 16) {
      store(scratch + d, fma(load(scratch + d), broadcast(keep), mul(load(outputs + d), broadcast(add))));
    }
  }
  finish_row(a, c, head, scratch, largest, sum, a.out + row * a.out_stride + int64_t(head) * a.head_dim);
}

constexpr kbit::AttentionKernels kAttentionKernels = {&append, &attend, &combine};

}  // namespace
