// What attention makes of scores: a chunk's weights, and chunks taken together (attention.h has the arithmetic).
#pragma once

#include <math.h>

#include "attention/attention_values.h"

namespace {

constexpr float kHide = -__builtin_huge_valf(), kShow = __builtin_huge_valf();

// Limits for the scores of a block's slots: from kLimits + 16 - n the first n are hidden, from kLimits + 32 - n all but
// the first n.
alignas(64) constexpr float kLimits[48] = {
    kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide,
    kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow, kShow,
    kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide, kHide};

// 2^x for x <= 0, to 1 ulp from -126 up; exactly 1 at 0 and exactly 0 from -127 down; NaN stays NaN. 2^n p(x - n) with
// the minimax polynomial of degree 6 (relative error 2.6e-9; Remez, constant term 1) on [-1/2, 1/2].
inline Floats power_of_two(Floats x) {
  x = max(broadcast(-127.0f), x);
  const Ints n = round_to_int(x);
  const Floats f = sub(x, to_float(n));
  Floats p = fma(f, broadcast(0.00015594677824992687f), broadcast(0.0013406643411144614f));
  p = fma(f, p, broadcast(0.009617692790925503f));
  p = fma(f, p, broadcast(0.055503103882074356f));
  p = fma(f, p, broadcast(0.24022652208805084f));
  p = fma(f, p, broadcast(0.6931472420692444f));
  p = fma(f, p, broadcast(1.0f));
  return mul(p, from_bits(shift_left<23>(add(n, broadcast(127)))));
}

struct ChunkSoftmax {
  float largest, sum;
};

// Scores of one row in a chunk become weights; slots [begin, end) are seen, begin < end.
ChunkSoftmax softmax_chunk(float* scores, int begin, int end) {
  const int first = begin / kSlots, last = (end - 1) / kSlots;
  if (begin % kSlots) {
    float* edge = scores + first * kSlots;
    store(edge, min(load(edge), load(kLimits + 16 - begin % kSlots)));
  }
  if (end % kSlots) {
    float* edge = scores + last * kSlots;
    store(edge, min(load(edge), load(kLimits + 32 - end % kSlots)));
  }
  Floats largest = load(scores + first * kSlots);
  for (int b = first + 1; b <= last; ++b) largest = max(largest, load(scores + b * kSlots));
  const float peak = reduce_max(largest);
  Floats sum = zero();
  for (int b = first; b <= last; ++b) {
    const Floats weight = power_of_two(sub(load(scores + b * kSlots), broadcast(peak)));
    store(scores + b * kSlots, weight);
    sum = add(sum, weight);
  }
  return {peak, reduce_add(sum)};
}

// Takes chunk results into what has been combined so far of n <= 8 rows: largest score and sum. keep and add say how
// outputs follow. Rows with chunk.sum 0 (nothing seen) stay.
inline void combine_chunks(float* largest, float* sum, const ChunkSoftmax* chunk, int n, float* keep, float* add) {
  alignas(64) float factors[16] = {};
  for (int r = 0; r < n; ++r) {
    const float both = chunk[r].largest > largest[r] ? chunk[r].largest : largest[r];
    factors[r] = largest[r] - both;
    factors[8 + r] = chunk[r].largest - both;
    largest[r] = both;
  }
  store(factors, power_of_two(load(factors)));
  for (int r = 0; r < n; ++r) {
    keep[r] = factors[r];
    add[r] = factors[8 + r];
    sum[r] = fmaf(sum[r], keep[r], chunk[r].sum * add[r]);
  }
}

}  // namespace
