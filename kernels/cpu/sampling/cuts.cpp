#include "sampling/cuts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <utility>

#include "isa/kernels.h"

namespace kbit {
namespace {

constexpr std::uint32_t kGroups = 1024;  // of weights of at most 1, by their upper 12 bits
constexpr double kUnit = 0x1p40;  // what sums of weights are counted in, so that they have no order

std::int64_t share_of(float weight) { return static_cast<std::int64_t>(static_cast<double>(weight) * kUnit); }

std::int64_t blocks_of(std::int64_t count) { return (count + kSampledBlock - 1) / kSampledBlock; }

template <typename Key> struct Item {
  Key key;
  std::int64_t share;
  std::int32_t at;
  bool operator<(const Item& other) const { return key < other.key || (key == other.key && at < other.at); }
};

// Orders items up to the last of the fewest whose shares, with what was before them, reach a sum; which that is.
template <typename Key> std::size_t cut_of(std::vector<Item<Key>>& items, std::int64_t before, std::int64_t target) {
  std::size_t begin = 0, end = items.size();
  while (end - begin > 32) {  // halves the stretch that it is in
    const std::size_t middle = begin + (end - begin) / 2;
    std::nth_element(items.begin() + begin, items.begin() + middle, items.begin() + end);
    std::int64_t sum = before;
    for (std::size_t i = begin; i < middle; ++i) sum += items[i].share;
    if (sum >= target) {
      end = middle;
    } else {
      before = sum;
      begin = middle;
    }
  }
  std::sort(items.begin() + begin, items.begin() + end);
  std::size_t last = begin;
  for (; last + 1 < end; ++last) {
    before += items[last].share;
    if (before >= target) break;
  }
  return last;
}

}  // namespace

Candidates::Candidates(const Kernels& kernels, const float* row, std::int64_t count, float best, float factor,
                       SamplingScratch& scratch)
    : kernels_(kernels), scratch_(scratch), values_(row), count_(count), best_(best), factor_(factor) {}

// Which values, of which block maxima are in the scratch, are at least `bound`: into `kept`.
void Candidates::find(const float* values, float bound) {
  std::vector<std::int32_t>& kept = scratch_.kept;
  kept.clear();
  for (std::int64_t block = 0; block < blocks_of(count_); ++block) {
    if (!(scratch_.maxima[block] >= bound)) continue;
    std::int32_t lanes[kSampledLanes];
    int some = 0;
    for (std::int32_t lane = 0; lane < kSampledLanes; ++lane) {
      if (scratch_.lanes[block * kSampledLanes + lane] >= bound) lanes[some++] = lane;
    }
    const std::int64_t end = std::min(count_, (block + 1) * kSampledBlock);
    for (std::int64_t row = block * kSampledBlock; row < end; row += kSampledLanes) {
      for (int i = 0; i < some && row + lanes[i] < end; ++i) {
        if (values[row + lanes[i]] >= bound) kept.push_back(static_cast<std::int32_t>(row) + lanes[i]);
      }
    }
  }
}

// Leaves those in `kept`.
void Candidates::take() {
  const std::vector<std::int32_t>& kept = scratch_.kept;
  scratch_.other_values.resize(kept.size());
  scratch_.other_tokens.resize(kept.size());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    scratch_.other_values[i] = values_[kept[i]];
    scratch_.other_tokens[i] = static_cast<std::int32_t>(token(kept[i]));
  }
  std::swap(scratch_.values, scratch_.other_values);
  std::swap(scratch_.tokens, scratch_.other_tokens);
  values_ = scratch_.values.data();
  tokens_ = scratch_.tokens.data();
  count_ = static_cast<std::int64_t>(kept.size());
}

double Candidates::weigh() {
  const std::int64_t blocks = blocks_of(count_);
  const auto room = [](std::vector<float>& v, std::int64_t size) {
    if (static_cast<std::int64_t>(v.size()) < size) v.resize(static_cast<std::size_t>(size));
  };
  room(scratch_.weights, blocks * kSampledBlock);
  room(scratch_.sums, blocks);
  room(scratch_.lanes, blocks * kSampledLanes);
  room(scratch_.maxima, blocks);
  kernels_.block_weights(values_, count_, best_, factor_, scratch_.weights.data(), scratch_.sums.data(),
                         scratch_.lanes.data(), scratch_.maxima.data());
  double total = 0;
  for (std::int64_t block = 0; block < blocks; ++block) total += static_cast<double>(scratch_.sums[block]);
  return total;
}

void Candidates::keep_top_k(std::int64_t k) {
  if (k >= count_) return;
  // The k-th largest of the maxima of groups is not above the k-th largest of all: a cheap first cut.
  const std::int64_t blocks = blocks_of(count_);
  std::vector<float>& order = scratch_.other_values;
  const auto kth = [&](const float* begin, std::int64_t count) {
    order.assign(begin, begin + count);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    return order[static_cast<std::size_t>(k - 1)];
  };
  float bound = -std::numeric_limits<float>::infinity();
  if (k <= blocks) {
    bound = kth(scratch_.maxima.data(), blocks);
  } else if (k <= blocks * kSampledLanes) {
    bound = kth(scratch_.lanes.data(), blocks * kSampledLanes);
  }
  find(values_, bound);
  take();
  const float exact = kth(values_, count_);
  scratch_.kept.clear();
  for (std::int64_t i = 0; i < count_; ++i) {
    if (values_[i] >= exact) scratch_.kept.push_back(static_cast<std::int32_t>(i));
  }
  take();
}

void Candidates::keep_top_p(double p) {
  const double total = weigh();
  const std::int64_t target = static_cast<std::int64_t>(p * total * kUnit);
  // Sorting is the dear part, so first what is improbable goes: what is above any threshold holds the nucleus if it
  // reaches p.
  for (const double threshold : {1e-3 * total, 1e-5 * total, 0.0}) {
    find(scratch_.weights.data(), static_cast<float>(std::min(1.0, threshold)));
    std::int64_t sum = 0;
    for (const std::int32_t i : scratch_.kept) sum += share_of(scratch_.weights[i]);
    if (sum >= target) break;
  }
  keep_largest(target);
}

// Of those in `kept`, leaves the fewest with the largest weights that reach a sum; at least one.
void Candidates::keep_largest(std::int64_t target) {
  // Weights by their upper bits, eight groups for a power of two: only one group has to be ordered.
  const auto group = [&](std::int32_t i) { return std::bit_cast<std::uint32_t>(scratch_.weights[i]) >> 20; };
  std::vector<std::int64_t> sums(kGroups, 0);
  for (const std::int32_t i : scratch_.kept) sums[group(i)] += share_of(scratch_.weights[i]);
  std::int64_t before = 0;
  std::uint32_t last = kGroups - 1;
  for (; last > 0 && before + sums[last] < std::max<std::int64_t>(target, 1); --last) before += sums[last];
  // Other logits may have the same weight: the larger stays, so that the largest of all always does.
  using Key = std::pair<float, float>;
  const auto item = [&](std::int32_t i) {
    return Item<Key>{{-scratch_.weights[i], -values_[i]}, share_of(scratch_.weights[i]), i};
  };
  std::vector<Item<Key>> items;
  for (const std::int32_t i : scratch_.kept) {
    if (group(i) == last) items.push_back(item(i));
  }
  if (!items.empty()) {
    const Item<Key> cut = items[cut_of(items, before, target)];
    std::erase_if(scratch_.kept, [&](std::int32_t i) { return cut < item(i); });
  }
  take();
}

void Candidates::keep_min_score(float bound) {
  // As a logit's rounded score does not fall where the logit grows, blocks whose largest is too small have none.
  scratch_.kept.clear();
  for (std::int64_t block = 0; block < blocks_of(count_); ++block) {
    const std::int64_t end = std::min(count_, (block + 1) * kSampledBlock);
    if (tokens_ == nullptr && !((scratch_.maxima[block] - best_) * factor_ >= bound)) continue;
    for (std::int64_t i = block * kSampledBlock; i < end; ++i) {
      if (score(i) >= bound) scratch_.kept.push_back(static_cast<std::int32_t>(i));
    }
  }
  take();
}

void Candidates::keep_typical(double p) {
  const double total = weigh();
  // A token's information is log(total) - score, and the entropy log(total) less the mean score: so log(total) goes.
  double sum = 0;
  for (std::int64_t i = 0; i < count_; ++i) {
    const float weight = scratch_.weights[i];
    sum += weight > 0 ? static_cast<double>(score(i)) * static_cast<double>(weight) : 0.0;
  }
  const double mean = sum / total;
  std::vector<double> keys(static_cast<std::size_t>(count_));
  scratch_.kept.resize(keys.size());
  for (std::int64_t i = 0; i < count_; ++i) {
    keys[i] = std::abs(static_cast<double>(score(i)) - mean);
    scratch_.kept[i] = static_cast<std::int32_t>(i);
  }
  keep_smallest(keys, static_cast<std::int64_t>(p * total * kUnit));
}

// Of those in `kept`, leaves the fewest with the smallest keys (one each) whose weights reach a sum; at least one.
void Candidates::keep_smallest(const std::vector<double>& keys, std::int64_t target) {
  std::vector<Item<double>> items(scratch_.kept.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = {keys[i], share_of(scratch_.weights[scratch_.kept[i]]), scratch_.kept[i]};
  }
  const std::size_t last = cut_of(items, 0, target);
  scratch_.kept.clear();
  for (std::size_t i = 0; i <= last; ++i) scratch_.kept.push_back(items[i].at);
  std::sort(scratch_.kept.begin(), scratch_.kept.end());
  take();
}

std::int64_t Candidates::draw(double uniform) {
  const double target = uniform * weigh();
  const std::int64_t blocks = blocks_of(count_);
  double before = 0;
  std::int64_t block = 0;
  for (; block < blocks - 1; ++block) {
    const double sum = before + static_cast<double>(scratch_.sums[block]);
    if (sum > target) break;
    before = sum;
  }
  const std::int64_t begin = block * kSampledBlock, end = std::min(count_, begin + kSampledBlock);
  double inside = 0;
  std::int64_t found = begin;
  for (std::int64_t i = begin; i < end; ++i) {
    inside += static_cast<double>(scratch_.weights[i]);
    if (scratch_.weights[i] > 0) found = i;  // added up in another order, the block may just miss the target
    if (inside + before > target) break;
  }
  return token(found);
}

}  // namespace kbit
