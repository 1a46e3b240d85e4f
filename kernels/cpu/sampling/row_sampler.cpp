#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/kernels.h"
#include "sampling/cuts.h"
#include "sampling/sampling.h"

namespace kbit {
namespace {

struct Largest {
  bool finite;
  float value;
  std::int64_t at;
};

// The largest number of a row and the first place it has; leaves the row's maxima in the scratch.
Largest largest_of(const Kernels& kernels, const float* row, std::int64_t count, SamplingScratch& scratch) {
  const std::int64_t blocks = (count + kSampledBlock - 1) / kSampledBlock;
  if (static_cast<std::int64_t>(scratch.maxima.size()) < blocks) {
    scratch.maxima.resize(static_cast<std::size_t>(blocks));
    scratch.lanes.resize(static_cast<std::size_t>(blocks * kSampledLanes));
  }
  const bool numbers = kernels.block_maxima(row, count, scratch.lanes.data(), scratch.maxima.data());
  if (!numbers) {
    const bool nan = std::any_of(row, row + count, [](float v) { return std::isnan(v); });
    return {false, nan ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity(), -1};
  }
  const float* best = std::max_element(scratch.maxima.data(), scratch.maxima.data() + blocks);
  if (!std::isfinite(*best)) return {false, *best, -1};
  std::int64_t at = (best - scratch.maxima.data()) * kSampledBlock;
  while (row[at] != *best) ++at;
  return {true, *best, at};
}

}  // namespace

double keyed_uniform(std::uint64_t seed, std::uint64_t choice, std::uint64_t position) {
  // numpy counts before it draws.
  std::uint64_t counter[4] = {position + 1, 0, 0, 0}, key[2] = {seed, choice};
  for (int round = 0; round < 10; ++round) {
    const auto first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ull) * counter[0];
    const auto second = static_cast<unsigned __int128>(0xCA5A826395121157ull) * counter[2];
    const std::uint64_t next[4] = {static_cast<std::uint64_t>(second >> 64) ^ counter[1] ^ key[0],
                                   static_cast<std::uint64_t>(second),
                                   static_cast<std::uint64_t>(first >> 64) ^ counter[3] ^ key[1],
                                   static_cast<std::uint64_t>(first)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B97F4A7C15ull;
    key[1] += 0xBB67AE8584CAA73Bull;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

RowSampler::RowSampler(SamplerSettings settings) : settings_(std::move(settings)) {
  penalises_ = !settings_.bias.empty() || settings_.repetition_penalty != 1 || settings_.presence_penalty != 0 ||
               settings_.frequency_penalty != 0;
}

void RowSampler::see(const std::int64_t* ids, std::int64_t count) {
  if (settings_.repetition_penalty == 1) return;  // the only one that counts a prompt
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] <= std::numeric_limits<std::int32_t>::max()) {
      counts_.try_emplace(static_cast<std::int32_t>(ids[i]), 0);
    }
  }
}

void RowSampler::penalise(float* row, std::int64_t count) const {
  for (const auto& [token, bias] : settings_.bias) {
    if (token < count) row[token] += bias;
  }
  const float repetition = settings_.repetition_penalty;
  const bool counted = settings_.presence_penalty != 0 || settings_.frequency_penalty != 0;
  for (const auto& [token, times] : counts_) {
    if (token >= count) continue;
    float& v = row[token];
    if (repetition != 1) v = v < 0 ? v * repetition : v / repetition;
    if (counted && times > 0) {
      v -= settings_.frequency_penalty * static_cast<float>(times) + settings_.presence_penalty;
    }
  }
}

Chosen RowSampler::choose(const Kernels& kernels, const float* logits, std::int64_t count, TokenMask mask,
                          SamplingScratch& scratch) {
  if (mask.allowed != nullptr || penalises_) {
    scratch.row.resize(static_cast<std::size_t>(count));
    float* row = scratch.row.data();
    if (mask.allowed != nullptr) {
      const std::int64_t known = std::min(count, mask.count);
      for (std::int64_t i = 0; i < known; ++i) row[i] = mask.allowed[i] ? logits[i] : -INFINITY;
      std::fill(row + known, row + count, -INFINITY);
    } else {
      std::memcpy(row, logits, sizeof(float) * static_cast<std::size_t>(count));
    }
    if (penalises_) penalise(row, count);
    logits = row;
  }
  const Largest best = largest_of(kernels, logits, count, scratch);
  if (!best.finite) return {-1, best.value};
  std::int64_t token = best.at;
  if (!settings_.greedy) {
    Candidates candidates(kernels, logits, count, best.value, settings_.factor, scratch);
    if (settings_.top_k > 0) candidates.keep_top_k(settings_.top_k);
    if (settings_.top_p < 1) candidates.keep_top_p(settings_.top_p);
    if (settings_.min_score > -INFINITY) candidates.keep_min_score(settings_.min_score);
    if (settings_.typical_p < 1) candidates.keep_typical(settings_.typical_p);
    token = candidates.draw(keyed_uniform(settings_.seed, settings_.choice, position_));
  }
  ++position_;
  if (penalises_) ++counts_.try_emplace(static_cast<std::int32_t>(token), 0).first->second;
  return {token, best.value};
}

bool score_row(const Kernels& kernels, const float* logits, std::int64_t count, std::int64_t top, float& best,
               double& total, std::int64_t* ids, float* values, SamplingScratch& scratch) {
  const Largest largest = largest_of(kernels, logits, count, scratch);
  best = largest.value;
  if (!largest.finite) return false;
  Candidates all(kernels, logits, count, best, 1.0f, scratch);
  if (top > 0) {
    Candidates most = all;
    most.keep_top_k(top);
    std::vector<std::int64_t> order(static_cast<std::size_t>(most.count()));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    std::partial_sort(order.begin(), order.begin() + top, order.end(), [&](std::int64_t a, std::int64_t b) {
      return most.value(a) > most.value(b) || (most.value(a) == most.value(b) && a < b);
    });
    for (std::int64_t i = 0; i < top; ++i) {
      ids[i] = most.token(order[i]);
      values[i] = most.value(order[i]);
    }
  }
  total = all.weigh();
  return true;
}

}  // namespace kbit
