#include "text/byte_pairs.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace kbit {
namespace {

[[noreturn]] void corrupt(const char* what) { throw std::runtime_error(what); }

std::uint64_t hash(std::string_view text) {  // FNV-1a
  std::uint64_t value = 0xcbf29ce484222325u;
  for (const char c : text) value = (value ^ static_cast<std::uint8_t>(c)) * 0x100000001b3u;
  return value ^ (value >> 32);
}

std::uint64_t hash(std::uint32_t left, std::uint32_t right) {
  const std::uint64_t value = ((std::uint64_t{left} << 32) | right) * 0x9e3779b97f4a7c15u;
  return value ^ (value >> 32);
}

// Calls visit(entry) for what the slots from `hash` on hold until one is free, or visit returns true. Returns the slot.
template <typename Visit>
std::size_t probe(const Numbers& slots, std::uint64_t hash, const Visit& visit) {
  const std::size_t mask = slots.size() - 1;
  std::size_t slot = hash & mask;
  for (std::size_t tried = 0; tried <= mask; ++tried, slot = (slot + 1) & mask) {
    const std::uint32_t entry = slots[slot];
    if (entry == 0 || visit(entry - 1)) return slot;
  }
  corrupt("a hash table is full");
}

std::string_view token_text(std::string_view texts, const Numbers& ends, std::uint32_t id) {
  const std::size_t start = id == 0 ? 0 : ends[id - 1], end = ends[id];
  if (start > end || end > texts.size()) corrupt("a token lies outside the text of all tokens");
  return texts.substr(start, end - start);
}

void put(std::span<std::uint8_t> slots, std::size_t slot, std::uint32_t entry) {
  std::memcpy(slots.data() + slot * sizeof entry, &entry, sizeof entry);
}

void require_slots(const Numbers& slots, std::size_t entries) {
  if (!std::has_single_bit(slots.size()) || slots.size() <= entries) corrupt("a hash table has the wrong size");
}

}  // namespace

Numbers::Numbers(std::span<const std::uint8_t> bytes) : data_(bytes.data()), count_(bytes.size() / sizeof(std::uint32_t)) {
  if (bytes.size() % sizeof(std::uint32_t) != 0) corrupt("a table ends within a number");
}

std::uint32_t Numbers::operator[](std::size_t index) const {
  std::uint32_t value;
  std::memcpy(&value, data_ + index * sizeof value, sizeof value);
  return value;
}

BytePairs::BytePairs(const BytePairTables& tables, bool ignore_merges) : tables_(tables), ignore_merges_(ignore_merges) {
  if (tables_.merges.size() % 3 != 0) corrupt("the merges end within a merge");
  require_slots(tables_.token_slots, size());
  require_slots(tables_.merge_slots, tables_.merges.size() / 3);
}

std::string_view BytePairs::text(std::uint32_t id) const { return token_text(tables_.texts, tables_.ends, id); }

std::optional<std::uint32_t> BytePairs::find(std::string_view text) const {
  std::optional<std::uint32_t> found;
  probe(tables_.token_slots, hash(text), [&](std::uint32_t id) {
    if (id >= size()) corrupt("a hash table names a token that does not exist");
    if (this->text(id) != text) return false;
    found = id;
    return true;
  });
  return found;
}

std::optional<BytePairs::Merge> BytePairs::merge(std::uint32_t left, std::uint32_t right) const {
  std::optional<Merge> found;
  probe(tables_.merge_slots, hash(left, right), [&](std::uint32_t rank) {
    const std::size_t at = std::size_t{3} * rank;
    if (at >= tables_.merges.size()) corrupt("a hash table names a merge that does not exist");
    if (tables_.merges[at] != left || tables_.merges[at + 1] != right) return false;
    const std::uint32_t joined = tables_.merges[at + 2];
    if (joined >= size()) corrupt("a merge makes a token that does not exist");
    found = Merge{rank, left, right, joined};
    return true;
  });
  return found;
}

void BytePairs::consider(std::int32_t at) {
  const std::int32_t next = at < 0 ? -1 : symbols_[at].next;
  if (next < 0) return;
  const auto found = merge(symbols_[at].id, symbols_[next].id);
  if (!found) return;
  candidates_.push_back({*found, at});
  std::push_heap(candidates_.begin(), candidates_.end(), Later());
}

void BytePairs::encode(std::span<const std::uint32_t> word, std::vector<std::uint32_t>& out) {
  if (word.size() > std::size_t{std::numeric_limits<std::int32_t>::max()}) corrupt("a word is too long");
  if (ignore_merges_) {
    std::string whole;
    for (const std::uint32_t id : word) {
      if (id >= size()) corrupt("a character is no token");
      whole += text(id);
    }
    if (const auto id = find(whole)) {
      out.push_back(*id);
      return;
    }
  }
  const auto length = static_cast<std::int32_t>(word.size());
  symbols_.clear();
  candidates_.clear();
  for (std::int32_t i = 0; i < length; ++i) symbols_.push_back({word[i], i - 1, i + 1 < length ? i + 1 : -1});
  for (std::int32_t i = 0; i < length; ++i) consider(i);
  while (!candidates_.empty()) {
    std::pop_heap(candidates_.begin(), candidates_.end(), Later());
    const auto [merge, at] = candidates_.back();
    candidates_.pop_back();
    Symbol& left = symbols_[at];
    // Both symbols must still be what they were: each may have been joined with another one since.
    if (left.next < 0 || left.id != merge.left || symbols_[left.next].id != merge.right) continue;
    Symbol& right = symbols_[left.next];
    left.id = merge.joined;
    left.next = right.next;
    right.next = -1;  // out of the list: no candidate of it counts any more
    if (left.next >= 0) symbols_[left.next].previous = at;
    consider(left.previous);
    consider(at);
  }
  for (std::int32_t i = length > 0 ? 0 : -1; i >= 0; i = symbols_[i].next) out.push_back(symbols_[i].id);
}

void fill_token_slots(std::string_view texts, const Numbers& ends, std::span<std::uint8_t> slots) {
  const Numbers filled(slots);
  require_slots(filled, ends.size());
  for (std::uint32_t id = 0; id < ends.size(); ++id) {
    const std::string_view text = token_text(texts, ends, id);
    put(slots, probe(filled, hash(text), [&](std::uint32_t other) { return token_text(texts, ends, other) == text; }), id + 1);
  }
}

void fill_merge_slots(const Numbers& merges, std::span<std::uint8_t> slots) {
  const Numbers filled(slots);
  if (merges.size() % 3 != 0) corrupt("the merges end within a merge");
  require_slots(filled, merges.size() / 3);
  for (std::uint32_t rank = 0; rank < merges.size() / 3; ++rank) {
    const std::uint32_t left = merges[std::size_t{3} * rank], right = merges[std::size_t{3} * rank + 1];
    const auto same = [&](std::uint32_t other) {
      return merges[std::size_t{3} * other] == left && merges[std::size_t{3} * other + 1] == right;
    };
    put(slots, probe(filled, hash(left, right), same), rank + 1);
  }
}

}  // namespace kbit
