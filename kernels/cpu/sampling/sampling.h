// From a row of logits to a token. What everything means is in kbit/engine/sampler.py and cuts.py; the results here are
// the same to the bit, on every instruction set.
#pragma once

#include <cstdint>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kbit {

struct Kernels;

struct SamplerSettings {
  bool greedy;
  float factor;     // 1 / temperature
  std::int64_t top_k;  // 0: all
  double top_p;     // 1: all
  float min_score;  // log(min-p); -inf: all
  double typical_p; // 1: all
  float repetition_penalty, presence_penalty, frequency_penalty;  // 1, 0, 0: none
  std::vector<std::pair<std::int32_t, float>> bias;
  std::uint64_t seed, choice;  // the key of the random numbers
};

// Which tokens of a row may be chosen: one byte a token, those beyond may not; no bytes: all may.
struct TokenMask {
  const bool* allowed = nullptr;
  std::int64_t count = 0;
};

struct Chosen {
  std::int64_t token;  // -1: the logits are no numbers, or none is possible
  float best;          // the largest logit, with all penalties
};

// Buffers that rows of one thread use one after another.
struct SamplingScratch {
  std::vector<float> row, lanes, maxima, weights, sums, values, other_values;
  std::vector<std::int32_t> tokens, other_tokens, kept;
};

// Philox 4x64-10 (Salmon et al. 2011): the number in [0, 1) of 53 bits that numpy's Philox gives for this key and counter.
double keyed_uniform(std::uint64_t seed, std::uint64_t choice, std::uint64_t position);

// Chooses the tokens of one answer and remembers them for the penalties.
class RowSampler {
 public:
  explicit RowSampler(SamplerSettings settings);

  // Tokens of the prompt. Ids below 0 are ignored.
  void see(const std::int64_t* ids, std::int64_t count);

  // The next token of logits (count), which is then counted.
  Chosen choose(const Kernels& kernels, const float* logits, std::int64_t count, TokenMask mask,
                SamplingScratch& scratch);

  std::uint64_t position() const { return position_; }  // tokens that were counted

 private:
  void penalise(float* row, std::int64_t count) const;

  SamplerSettings settings_;
  bool penalises_;
  std::uint64_t position_ = 0;
  std::unordered_map<std::int32_t, std::int32_t> counts_;  // of tokens seen; 0: in the prompt alone
};

// A row's largest logit and the sum of e^(logit - largest), and its `top` largest, the first in the vocabulary first.
// False: it is not finite.
bool score_row(const Kernels& kernels, const float* logits, std::int64_t count, std::int64_t top, float& best,
               double& total, std::int64_t* ids, float* values, SamplingScratch& scratch);

}  // namespace kbit
