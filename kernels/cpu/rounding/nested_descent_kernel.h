// The kernel behind nested_descent.h, over the vector interface: a lane is a row where errors are passed on, and a code where
// the best one is looked for.
#pragma once

#include <stdint.h>

#include "rounding/descent_kernel.h"
#include "rounding/nested_descent.h"

namespace {

using kbit::kMostWidths;
using kbit::NestedDescentTask;

// The least that codes cost from a width on, by what they begin with: [bits][beginning], with room to read 16 at a time.
struct Costs {
  alignas(64) float least[9][256 + kRoundLanes];
};

// The best code for one weight, or -1 where none is better than the one it has.
inline int best_code(const NestedDescentTask& t, Costs& costs, int code, float bend, const float* scales,
                     const float* slopes) {
  const int widest = t.bits[t.widths - 1];
  int p = t.widths - 1;
  for (int bits = widest; bits >= t.bits[0]; --bits) {
    float* least = costs.least[bits];
    const int count = 1 << bits;
    const float* further = bits < widest ? costs.least[bits + 1] : nullptr;
    const bool counts = t.bits[p] == bits;
    const Floats scale = broadcast(scales[p]), back = broadcast(-t.levels[p][code & (count - 1)] * scales[p]);
    const Floats curve = broadcast(bend * t.weights[p]), slope = broadcast(-2.0f * slopes[p] * t.weights[p]);
    for (int c = 0; c < count; c += kRoundLanes) {
      Floats cost = zero();
      if (further) cost = min(load(further + c), load(further + c + count));
      if (counts) {
        const Floats step = fma(load(t.levels[p] + c), scale, back);
        cost = fma(step, fma(step, curve, slope), cost);
      }
      store(least + c, cost);
    }
    if (counts) --p;
  }
  const float* first = costs.least[t.bits[0]];
  int best = 0;
  for (int c = 1; c < 1 << t.bits[0]; ++c)
    if (first[c] < first[best]) best = c;
  if (!(first[best] < 0.0f)) return -1;
  for (int bits = t.bits[0]; bits < widest; ++bits) {
    const float* next = costs.least[bits + 1];
    if (next[best | 1 << bits] < next[best]) best |= 1 << bits;
  }
  return best == code ? -1 : best;
}

void descend_nested_rows(const NestedDescentTask& t) {
  const Rows among(t);
  const int64_t columns = t.columns, blocks = (columns + t.block - 1) / t.block, size = kRoundLanes * columns;
  const int widths = t.widths;
  float* slopes = t.scratch;               // (widths, columns, 16)
  float* change = slopes + widths * size;  // (widths, columns, 16)
  float* heard = change + widths * size;   // (widths, columns, 16)
  Costs costs;
  for (int p = 0; p < widths; ++p) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int r = 0; r < kRoundLanes; ++r) {
        const float slope = r < t.rows ? t.slopes[p * t.slope_stride + r * columns + j] : 0.0f;
        slopes[p * size + kRoundLanes * j + r] = slope;
        change[p * size + kRoundLanes * j + r] = 0.0f;
      }
    }
  }
  for (int64_t tile_end = columns; tile_end > 0;) {
    const int64_t tile = tile_end > kRoundTile ? tile_end - kRoundTile : 0;
    for (int p = 0; p < widths; ++p) {
      for (int64_t j = tile; j < tile_end; ++j) store(heard + p * size + kRoundLanes * j, zero());
      if (tile_end < columns) hear(t.inputs, columns, change + p * size, heard + p * size, tile, tile_end, tile_end, columns);
    }
    for (int64_t j = tile_end - 1; j >= tile; --j) {
      const float weight = t.inputs[j * columns + j];
      Floats slope[kMostWidths];
      alignas(64) float moved[kMostWidths][kRoundLanes] = {};
      for (int p = 0; p < widths; ++p) {
        slope[p] = among.heard(load(slopes + p * size + kRoundLanes * j), heard + p * size + kRoundLanes * j);
      }
      bool any = false;
      for (int r = 0; r < int(t.rows); ++r) {
        const float bend = among.at[r][r] * weight;
        const int64_t at = r * blocks + j / t.block;
        if (!(bend > 0.0f) || !(t.scales[at] > 0.0f)) continue;
        float scales[kMostWidths], now[kMostWidths];
        for (int p = 0; p < widths; ++p) {
          alignas(64) float lanes[kRoundLanes];
          store(lanes, slope[p]);
          now[p] = lanes[r];
          scales[p] = t.scales[p * t.scale_stride + at];
        }
        uint8_t& code = t.codes[r * columns + j];
        const int best = best_code(t, costs, code, bend, scales, now);
        if (best < 0) continue;
        any = true;
        for (int p = 0; p < widths; ++p) {
          const int mask = (1 << t.bits[p]) - 1;
          const float step = (t.levels[p][best & mask] - t.levels[p][code & mask]) * scales[p];
          moved[p][r] = step;
          slope[p] = fma(among.of(r), broadcast(-step * weight), slope[p]);
        }
        code = uint8_t(best);
      }
      if (!any) continue;
      for (int p = 0; p < widths; ++p) {
        const Floats move = load(moved[p]);
        store(change + p * size + kRoundLanes * j, move);
        for (int64_t i = tile; i < j; ++i) {
          float* of = heard + p * size + kRoundLanes * i;
          store(of, fma(broadcast(t.inputs[j * columns + i]), move, load(of)));
        }
      }
    }
    tile_end = tile;
  }
  for (int p = 0; p < widths; ++p) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int r = 0; r < int(t.rows); ++r) {
        t.change[p * t.slope_stride + r * columns + j] = change[p * size + kRoundLanes * j + r];
      }
    }
  }
}

}  // namespace
