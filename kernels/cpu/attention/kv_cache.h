// Keys and values of every layer, for a fixed number of tokens per row of the batch.
//
// One strip per layer, row and key/value head, in blocks of 16 slots (tokens):
//
//   strip:  | keys of slots 0..15 | keys of 16..31 | ..  | values of slots 0..15 | values of 16..31 | ..
//
//   keys    one slot to a lane, so that scores need no sums across lanes
//     floats  [D][16 slots]
//     codes   [D / 4 quads][16 slots][4 features]: what an integer dot product takes; then scales [groups][16 slots]
//   values  one feature to a lane, so that sums over slots need none
//     floats  [16 slots][D up to a multiple of 16]
//     codes   [D / 16][words][16 features]: a word (32 bits) of a lane holds consecutive slots; then scales as above
//
//   codes of k bits lie in planes (3 bits: a plane of the low 2, then one of the top bit). A plane of width w keeps
//     keys:    in bits f w .. of vector v (64 bytes), the codes of quad v (8 / w) + f: a slot owns whole bytes
//     values:  in bits s w .. of a lane, the codes of slot s, 32 / w slots to a word (1 bit: words of 16 bits)
//
// A group is 32 features, or 16 where 32 does not divide D. Codes are those of reference.quantize_kv: keys (after
// rotary positions) and values go through a Hadamard transform per group, then to 2^k levels times a scale (fp16).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/attention_kernels.h"

namespace kbit {

class KVCache {
 public:
  // kind: "fp32", "fp16", "8", "4", "3" or "2" (bits). Throws std::invalid_argument: a count below 1, an unknown kind,
  // codes with a head_dim that is not a multiple of 16. Memory is taken from the system when a token is written.
  KVCache(std::int64_t layers, std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity,
          const std::string& kind);
  ~KVCache();
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;

  const std::string& kind() const { return kind_; }
  std::int64_t layers() const { return layers_; }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t batch() const { return view_.rows; }
  std::int64_t nbytes() const { return bytes_; }
  const std::vector<std::int64_t>& lengths() const { return lengths_; }  // tokens per row
  const CacheView& view() const { return view_; }

  // Throws std::invalid_argument if a row has no room for so many more tokens.
  void reserve(const std::vector<std::int64_t>& more) const;
  // Counts tokens that were written.
  void advance(const std::vector<std::int64_t>& more);
  // Forgets tokens from these positions on, per row; shorter rows stay.
  void truncate(const std::vector<std::int64_t>& lengths);
  // Keeps these rows in this order; a row may appear several times.
  void select(const std::vector<std::int64_t>& rows);
  // Room for at least `capacity` tokens per row; never less than before.
  void grow(std::int64_t capacity);
  // Keys and values of a row's tokens, (kv_heads, length, D) each, as attention understands them.
  void dequantize(std::int64_t layer, std::int64_t row, float* keys, float* values) const;

 private:
  void check_rows(const std::vector<std::int64_t>& values, const char* what) const;
  // A new arena of `capacity` slots whose row i is this one's row rows[i].
  void rebuild(const std::vector<std::int64_t>& rows, std::int64_t capacity);

  std::string kind_;
  std::int64_t layers_, capacity_;
  std::int64_t bytes_ = 0;
  CacheView view_{};
  std::vector<std::int64_t> lengths_;
};

}  // namespace kbit
