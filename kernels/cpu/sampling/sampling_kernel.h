// Passes over a row of logits, in blocks of 256 numbers. Included after a simd header.
#pragma once

#include <float.h>
#include <math.h>

namespace {

constexpr int64_t kSampledBlock = 256;

// A block's numbers; those beyond the row's end are -inf.
inline const float* sampled_block(const float* x, int64_t count, int64_t begin, float* padded) {
  if (begin + kSampledBlock <= count) return x + begin;
  for (int64_t i = 0; i < kSampledBlock; ++i) padded[i] = begin + i < count ? x[begin + i] : -INFINITY;
  return padded;
}

// The largest number of every block and of every 16th of a block, its lanes. False: a number is NaN or infinity.
bool block_maxima(const float* x, int64_t count, float* lanes, float* maxima) {
  float padded[kSampledBlock];
  Floats odd = zero();  // becomes NaN
  for (int64_t begin = 0, block = 0; begin < count; begin += kSampledBlock, ++block) {
    const float* p = sampled_block(x, count, begin, padded);
    Floats largest = broadcast(-INFINITY);
    for (int i = 0; i < kSampledBlock; i += 16) {
      const Floats v = load(p + i);
      odd = add(odd, mul(max(broadcast(-FLT_MAX), v), zero()));  // of two operands, max takes the second if one is NaN
      largest = max(v, largest);
    }
    store(lanes + 16 * block, largest);
    maxima[block] = reduce_max(largest);
  }
  const float found = reduce_add(odd);
  return found == found;
}

// e^x for x in [-60, 0], to 3 + |x| / 2 units of rounding: kbit/engine/cuts.py says it in numpy, hence no fused products.
inline Floats unfused_exponential(Floats x) {
  const Floats magic = broadcast(12583039.0f);  // 3 2^22 + 127: such numbers are whole, and end in an exponent's bits
  const Floats exponent = mul(x, broadcast(1.44269504088896341f));
  const Floats shifted = add(exponent, magic);
  const Floats r = sub(exponent, sub(shifted, magic));
  Floats p = broadcast(1.3274633093e-3f);
  p = add(mul(p, r), broadcast(9.6719618887e-3f));
  p = add(mul(p, r), broadcast(5.5506784469e-2f));
  p = add(mul(p, r), broadcast(2.4022234976e-1f));
  p = add(mul(p, r), broadcast(6.9314706326e-1f));
  p = add(mul(p, r), broadcast(1.0f));
  return mul(p, from_bits(shift_left<23>(bits_of(shifted))));
}

// weights[i] = e^s - e^-60 for s = (x[i] - best) factor, 0 below -60, up to the end of the last block; of every block
// their sum, their largest and the largest of its lanes.
void block_weights(const float* x, int64_t count, float best, float factor, float* weights, float* sums, float* lanes,
                   float* maxima) {
  float padded[kSampledBlock];
  const Floats lowest = broadcast(-60.0f), none = unfused_exponential(lowest);
  for (int64_t begin = 0, block = 0; begin < count; begin += kSampledBlock, ++block) {
    const float* p = sampled_block(x, count, begin, padded);
    Floats sum = zero(), largest = broadcast(-INFINITY);
    for (int i = 0; i < kSampledBlock; i += 16) largest = max(load(p + i), largest);
    if ((reduce_max(largest) - best) * factor <= -60.0f) {  // most blocks are, at low temperatures
      for (int i = 0; i < kSampledBlock; i += 16) store(weights + begin + i, zero());
      sums[block] = maxima[block] = 0.0f;
      store(lanes + 16 * block, zero());
      continue;
    }
    largest = zero();
    for (int i = 0; i < kSampledBlock; i += 16) {
      const Floats score = mul(sub(load(p + i), broadcast(best)), broadcast(factor));
      const Floats weight = sub(unfused_exponential(max(score, lowest)), none);
      store(weights + begin + i, weight);
      sum = add(sum, weight);
      largest = max(weight, largest);
    }
    sums[block] = reduce_add(sum);
    store(lanes + 16 * block, largest);
    maxima[block] = reduce_max(largest);
  }
}

}  // namespace
