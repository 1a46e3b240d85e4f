// Byte-pair encoding over tables that lie in a file's map (kbit/text/token_table.py lays them out). Nothing is parsed or
// copied first, so a vocabulary of any size is ready at once. The file may be hostile or change while it is mapped: every
// number read from it is checked where it is used, and what does not fit throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace kbit {

// uint32 numbers at any alignment.
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(std::span<const std::uint8_t> bytes);

  std::size_t size() const { return count_; }
  std::uint32_t operator[](std::size_t index) const;  // index < size()

 private:
  const std::uint8_t* data_ = nullptr;
  std::size_t count_ = 0;
};

struct BytePairTables {
  std::string_view texts;  // all tokens, one after the other
  Numbers ends;            // where token i ends in texts; it starts where the one before ends
  Numbers token_slots;     // open addressing by a token's hash: 1 + its id, or 0; a power of two, at least one slot free
  Numbers merges;          // left id, right id, id of both joined: by rank
  Numbers merge_slots;     // open addressing by a pair's hash: 1 + its rank, or 0; likewise
};

class BytePairs {
 public:
  BytePairs(const BytePairTables& tables, bool ignore_merges);

  std::size_t size() const { return tables_.ends.size(); }
  std::string_view text(std::uint32_t id) const;  // id < size()
  std::optional<std::uint32_t> find(std::string_view text) const;

  // Appends the tokens of one word, given as the ids of its characters. While an adjacent pair has a merge, the pair of
  // the lowest rank is joined, the leftmost on ties. With ignore_merges a word that is a token as a whole stays whole.
  void encode(std::span<const std::uint32_t> word, std::vector<std::uint32_t>& out);

 private:
  struct Merge {
    std::uint32_t rank, left, right, joined;
  };
  struct Symbol {
    std::uint32_t id;
    std::int32_t previous, next;  // -1 at the word's ends
  };
  struct Candidate {
    Merge merge;
    std::int32_t at;  // index of the left symbol
  };
  struct Later {
    bool operator()(const Candidate& a, const Candidate& b) const {
      return a.merge.rank != b.merge.rank ? a.merge.rank > b.merge.rank : a.at > b.at;
    }
  };
  std::optional<Merge> merge(std::uint32_t left, std::uint32_t right) const;
  void consider(std::int32_t at);

  BytePairTables tables_;
  bool ignore_merges_;
  // Reused from word to word.
  std::vector<Symbol> symbols_;
  std::vector<Candidate> candidates_;  // a heap
};

// Fill slots (zeroed, a power of two, more than there are entries). A pair that is listed twice has the later rank.
void fill_token_slots(std::string_view texts, const Numbers& ends, std::span<std::uint8_t> slots);
void fill_merge_slots(const Numbers& merges, std::span<std::uint8_t> slots);

}  // namespace kbit
