// Who computes what in the attentions of one pass.
//
// Rows of one sequence are cut into query blocks at fixed positions, so that a block lies in one chunk of slots and
// owns whole blocks of the cache. A task is a query block, a key/value head, and all chunks; or, when there are fewer
// such tasks than keep a team busy, some chunks, and a second loop combines (flash-decoding, Dao et al. 2023). When
// every sequence has only one query block, the task that has its last chunk writes its keys and values first, so a
// decoded token costs one loop, or two when split.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention_kernels.h"
#include "program/threads.h"

namespace kbit {

// The plan of a pass for attentions that have the same heads, and the memory that these need, kept between passes.
class AttentionScratch {
 public:
  // Before the parallel part. sequence, position: (rows), as in AttentionArgs. members: of the team. last: (rows), the
  // last slot each row sees, not descending within a sequence; null where that is its own.
  void prepare(std::int64_t rows, const std::int32_t* sequence, const std::int32_t* position, int heads, int kv_heads,
               int head_dim, int members, const std::int32_t* last = nullptr);

  // For passes whose attentions have a key_bias: the angles of positions [0, stop), from tables (stop or more, half)
  // whose rows are positions. Those of earlier calls, which had the same half, are kept.
  void prepare_angles(const float* cos, const float* sin, int half, std::int64_t stop);
  const float* angles() const { return angles_.data(); }

  // (rows), the last slot each row of the prepared pass sees; null where that is its own.
  const std::int32_t* last() const { return last_.empty() ? nullptr : last_.data(); }

 private:
  friend void attention(const AttentionKernels&, Worker&, const AttentionArgs&, AttentionScratch&);

  struct Block {
    std::int64_t first_row, rows;
  };
  struct Piece {
    std::int64_t block, chunk_begin, chunk_end;
    bool appends;  // has the block's last chunk, where its tokens go
  };

  void cut_blocks(std::int64_t rows, const std::int32_t* sequence, const std::int32_t* position, int group);
  void cut_pieces(const std::int32_t* position, int heads, int kv_heads, int padded, std::int64_t rows, int members);

  std::vector<std::int32_t> last_;
  std::vector<float> angles_;  // (positions / 16, 2 * half, 16)
  std::int64_t angles_end_ = 0;
  std::vector<Block> blocks_;
  std::vector<Piece> pieces_;
  bool fused_ = true;   // pieces append
  bool split_ = false;  // pieces of a block have different chunks
  std::int64_t worker_floats_ = 0;
  std::vector<float> memory_;  // one task's scratch per member
  std::vector<float> partial_memory_;
  Partials partials_{};
};

// One attention, run by every member of a team; `out` is complete when it returns. args must be of the prepared pass.
// Without k and v, keys and values are already in the cache; without q and out, they are only written there.
void attention(const AttentionKernels& kernels, Worker& worker, const AttentionArgs& args, AttentionScratch& scratch);

}  // namespace kbit
