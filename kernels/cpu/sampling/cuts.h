// Candidates for the next token, and what top-k, top-p, min-p and typical sampling leave of them (kbit/engine/cuts.py).
#pragma once

#include <cstdint>

#include "sampling/sampling.h"

namespace kbit {

constexpr std::int64_t kSampledBlock = 256, kSampledLanes = 16;

class Candidates {
 public:
  // All of a row whose block_maxima are in the scratch, `best` being the largest.
  Candidates(const Kernels& kernels, const float* row, std::int64_t count, float best, float factor,
             SamplingScratch& scratch);

  void keep_top_k(std::int64_t k);
  void keep_top_p(double p);
  void keep_min_score(float score);
  void keep_typical(double p);
  std::int64_t draw(double uniform);  // a token
  double weigh();                     // the sum of all weights, which then are in the scratch

  std::int64_t count() const { return count_; }
  float value(std::int64_t i) const { return values_[i]; }
  std::int64_t token(std::int64_t i) const { return tokens_ ? tokens_[i] : i; }

 private:
  void find(const float* values, float bound);
  void take();
  void keep_largest(std::int64_t target);
  void keep_smallest(const std::vector<double>& keys, std::int64_t target);
  float score(std::int64_t i) const { return (values_[i] - best_) * factor_; }

  const Kernels& kernels_;
  SamplingScratch& scratch_;
  const float* values_;                   // logits, in the vocabulary's order
  const std::int32_t* tokens_ = nullptr;  // null: all there are
  std::int64_t count_;
  float best_, factor_;
};

}  // namespace kbit
