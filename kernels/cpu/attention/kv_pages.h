// Memory for keys and values, in pages of 64 slots (tokens) of one sequence. A page has one id and holds all layers and
// key/value heads, of which layers may have different ones; which pages a sequence has, and in which order, is its block table's, kept by kbit/graph/pages.py.
//
//   page:   | layer 0: | head 0 | head 1 | .. | layer 1: | head 0 | ..            a strip for each, in blocks of 16 slots
//   strip:  | keys of slots 0..15 | of 16..31 | of 32..47 | of 48..63 | values of slots 0..15 | .. |
//
//   keys    one slot to a lane, so that scores need no sums across lanes
//     floats  [D][16 slots]
//     codes   [D / 4 quads][16 slots][4 features]: what an integer dot product takes; then scales [groups][16 slots]
//   values  one feature to a lane, so that sums over slots need none
//     floats  [16 slots][D up to a multiple of 16]
//     codes   [D / 16][words][16 features]: a word (32 bits) of a lane holds consecutive slots; then scales as above
//
//   latent layers have keys alone, which are their values too: a strip ends where values would begin
//
//   codes of k bits lie in planes (3 bits: a plane of the low 2, then one of the top bit). A plane of width w keeps
//     keys:    in bits f w .. of vector v (64 bytes), the codes of quad v (8 / w) + f: a slot owns whole bytes
//     values:  in bits s w .. of a lane, the codes of slot s, 32 / w slots to a word (1 bit: words of 16 bits)
//
// A group is 32 features, or 16 where 32 does not divide D. Codes are those of reference.quantize_kv, at 4 bits those of
// reference.quantize_kv_4: keys (after rotary positions) and values go through a Hadamard transform per group, then to
// 2^k levels times a scale (fp16). Where
// attention is given a bias that all keys have (AttentionArgs::key_bias), codes are of keys without it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/attention_kernels.h"

namespace kbit {

// The key/value heads of a layer, and the features of each.
struct KVHeads {
  std::int64_t count, dim;
  bool latent = false;  // keys are values, too, and kept once
};

class KVPages {
 public:
  // kind: "fp32", "fp16", "8", "4", "3" or "2" (bits), or two of these widths, "8,4": of keys and of values. Throws
  // std::invalid_argument: a count below 1, an unknown kind, codes with a head_dim that is not a multiple of 16, or of two
  // widths where keys are values. Memory is taken from the system when a token is written. layers: the heads of each.
  KVPages(const std::vector<KVHeads>& layers, const std::string& kind, std::int64_t count);
  ~KVPages();
  KVPages(const KVPages&) = delete;
  KVPages& operator=(const KVPages&) = delete;

  // Bytes of a page. Throws as the constructor does.
  static std::int64_t page_bytes(const std::vector<KVHeads>& layers, const std::string& kind);

  const std::string& kind() const { return kind_; }
  std::int64_t layers() const { return static_cast<std::int64_t>(views_.size()); }
  std::int64_t count() const { return static_cast<std::int64_t>(pages_.size()); }
  std::int64_t page_bytes() const { return page_bytes_; }
  const CacheView& view(std::int64_t layer) const { return views_[static_cast<std::size_t>(layer)]; }

  // Room for at least `count` pages; those there are stay where they lie.
  void resize(std::int64_t count);
  // Makes page `target` the same as `source`. Throws std::invalid_argument: there is no such page.
  void copy(std::int64_t source, std::int64_t target);
  // Where the page_bytes() of a page lie. Throws std::invalid_argument: there is no such page.
  std::uint8_t* page(std::int64_t id) const;
  // Keys and values of a sequence's first `length` tokens, (kv_heads, length, D) each, as attention understands them.
  void dequantize(std::int64_t layer, const std::int32_t* table, std::int64_t length, float* keys, float* values) const;

 private:
  struct Arena {
    std::uint8_t* data;
    std::int64_t bytes;
  };

  std::string kind_;
  std::int64_t page_bytes_;
  std::vector<CacheView> views_;  // of layers
  std::vector<Arena> arenas_;
  std::vector<std::uint8_t*> pages_;
};

}  // namespace kbit
