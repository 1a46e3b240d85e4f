#include "attention/attention_plan.h"

#include <algorithm>

#include "attention/kv_pages.h"

namespace kbit {
namespace {

// Rows (token, head) that share unpacked keys and values: enough that unpacking is a few percent.
constexpr int kBlockRows = 48;

// Chunk results of a split pass may take this many floats (64 MiB).
constexpr std::int64_t kPartialFloats = 16 << 20;

// Pieces per member that even out unequal speeds.
constexpr std::int64_t kPiecesPerMember = 6;

// Tokens of a query block: a power of two between kSlots and kChunk, so that blocks end where chunks do.
int block_tokens(int group) {
  int tokens = kSlots;
  while (2 * tokens * group <= kBlockRows + 16 && 2 * tokens <= kChunk) tokens *= 2;
  return tokens;
}

float* aligned(std::vector<float>& memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / 4;
}

void resize(std::vector<float>& memory, std::int64_t floats) {
  if (static_cast<std::int64_t>(memory.size()) < floats + 16) memory.resize(static_cast<std::size_t>(floats + 16));
}

}  // namespace

void AttentionScratch::prepare(std::int64_t rows, const std::int32_t* sequence, const std::int32_t* position, int heads,
                               int kv_heads, int head_dim, int members, const std::int32_t* last) {
  const int group = heads / kv_heads, padded = (head_dim + 15) / 16 * 16;
  last_.clear();
  if (last) last_.assign(last, last + rows);
  cut_blocks(rows, sequence, position, group);
  cut_pieces(position, heads, kv_heads, padded, rows, members);
  std::int64_t most = 1;
  for (const Block& block : blocks_) most = std::max(most, block.rows * group);
  worker_floats_ = task_memory(most, head_dim, padded, padded / 16).total;
  resize(memory_, worker_floats_ * members);
}

void AttentionScratch::prepare_angles(const float* cos, const float* sin, int half, std::int64_t stop) {
  const std::int64_t block = std::int64_t{2} * half * kSlots, blocks = (stop + kSlots - 1) / kSlots;
  const auto floats = static_cast<std::size_t>(blocks * block);
  if (floats > angles_.size()) angles_.resize(floats);
  for (; angles_end_ < stop; ++angles_end_) {
    float* to = angles_.data() + angles_end_ / kSlots * block + angles_end_ % kSlots;
    for (int i = 0; i < half; ++i) {
      to[i * kSlots] = cos[angles_end_ * half + i];
      to[(half + i) * kSlots] = sin[angles_end_ * half + i];
    }
  }
}

void AttentionScratch::cut_blocks(std::int64_t rows, const std::int32_t* sequence, const std::int32_t* position,
                                  int group) {
  const int tokens = block_tokens(group);
  blocks_.clear();
  fused_ = true;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (row > 0 && sequence[row] == sequence[row - 1]) {
      if (position[row] / tokens == position[row - 1] / tokens) {
        ++blocks_.back().rows;
        continue;
      }
      fused_ = false;
    }
    blocks_.push_back({row, 1});
  }
}

void AttentionScratch::cut_pieces(const std::int32_t* position, int heads, int kv_heads, int padded, std::int64_t rows,
                                  int members) {
  const auto chunks_of = [&](const Block& block) {
    const std::int64_t row = block.first_row + block.rows - 1;
    return std::int64_t{last() ? last()[row] : position[row]} / kChunk + 1;
  };
  std::int64_t most_chunks = 1, all_chunks = 0;
  for (const Block& block : blocks_) {
    most_chunks = std::max(most_chunks, chunks_of(block));
    all_chunks += chunks_of(block);
  }
  const std::int64_t tasks = static_cast<std::int64_t>(blocks_.size()) * kv_heads, enough = kPiecesPerMember * members;
  const std::int64_t floats = rows * heads * most_chunks * (padded + 2) + 64;
  split_ = members > 1 && most_chunks > 1 && tasks < enough && floats <= kPartialFloats;
  // Chunks per piece, so that all blocks and heads make about `enough` pieces.
  const std::int64_t step = split_ ? std::max<std::int64_t>(1, all_chunks * kv_heads / enough) : most_chunks;
  pieces_.clear();
  for (std::size_t b = 0; b < blocks_.size(); ++b) {
    const std::int64_t chunks = chunks_of(blocks_[b]);
    for (std::int64_t begin = 0; begin < chunks; begin += step) {
      const std::int64_t end = std::min(begin + step, chunks);
      pieces_.push_back({static_cast<std::int64_t>(b), begin, end, fused_ && end == chunks});
    }
  }
  if (!split_) return;
  resize(partial_memory_, floats);
  const std::int64_t count = rows * heads * most_chunks;
  partials_.outputs = aligned(partial_memory_);
  partials_.maxima = partials_.outputs + count * padded;
  partials_.sums = partials_.maxima + count;
  partials_.chunks = most_chunks;
}

void attention(const AttentionKernels& kernels, Worker& worker, const AttentionArgs& args, AttentionScratch& scratch) {
  const CacheView& cache = args.cache->view(args.layer);
  AttentionArgs seen = args;
  seen.last = scratch.last();
  float* memory = aligned(scratch.memory_) + worker.index() * scratch.worker_floats_;
  const int kv_heads = args.kv_heads;
  if (args.k && !(scratch.fused_ && args.q)) {
    worker.for_each(static_cast<std::int64_t>(scratch.blocks_.size()) * kv_heads, 1, [&](std::int64_t i, std::int64_t) {
      const AttentionScratch::Block& block = scratch.blocks_[static_cast<std::size_t>(i / kv_heads)];
      kernels.append(args, cache, block.first_row, block.rows, static_cast<int>(i % kv_heads), memory);
    });
  }
  if (!args.q) return;
  worker.for_each(static_cast<std::int64_t>(scratch.pieces_.size()) * kv_heads, 1, [&](std::int64_t i, std::int64_t) {
    const AttentionScratch::Piece& piece = scratch.pieces_[static_cast<std::size_t>(i / kv_heads)];
    const AttentionScratch::Block& block = scratch.blocks_[static_cast<std::size_t>(piece.block)];
    const int kv_head = static_cast<int>(i % kv_heads);
    if (piece.appends && args.k) kernels.append(args, cache, block.first_row, block.rows, kv_head, memory);
    kernels.attend({&seen, &cache, scratch.split_ ? &scratch.partials_ : nullptr, block.first_row, block.rows,
                    piece.chunk_begin, piece.chunk_end, kv_head, memory});
  });
  if (!scratch.split_) return;
  const std::int64_t results = args.rows * args.heads;
  const std::int64_t grain = std::max<std::int64_t>(1, results / (4 * worker.size()));
  worker.for_each(results, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      kernels.combine(seen, cache, scratch.partials_, i / args.heads, static_cast<int>(i % args.heads), memory);
    }
  });
}

}  // namespace kbit
