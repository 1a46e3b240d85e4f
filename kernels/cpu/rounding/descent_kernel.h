// The kernel behind descent.h, over the vector interface: a lane is a row.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rounding/descent.h"
#include "rounding/rounding_kernel.h"

namespace {

using kbit::DescentTask;

// H_O among the rows of a task, padded with zeros.
struct Rows {
  alignas(64) float at[kRoundLanes][kRoundLanes];

  template <typename Task> explicit Rows(const Task& t) {
    for (int r = 0; r < kRoundLanes; ++r) {
      for (int m = 0; m < kRoundLanes; ++m) at[r][m] = r < t.rows && m < t.rows ? t.outputs[r * t.rows + m] : 0.0f;
    }
  }
  Floats of(int r) const { return load(at[r]); }
  // slope - H_O x
  Floats heard(Floats slope, const float* x) const {
    for (int r = 0; r < kRoundLanes; ++r) slope = fma(of(r), broadcast(-x[r]), slope);
    return slope;
  }
};

// One step of Newton's method, exact, for a number per row (a scale, an offset) that values in [begin, end) depend on
// by `factor`: value[j] += step * factor[j]. `scratch` has room for the block.
inline void move_number(const DescentTask& t, const Rows& among, const float* factor, float* slopes, float* change,
                        float* scratch, int64_t begin, int64_t end, int64_t n, float* numbers, bool positive) {
  const int64_t blocks = (t.columns + t.block - 1) / t.block;
  for (int64_t j = begin; j < end; ++j) store(scratch + kRoundLanes * j, zero());
  hear(t.inputs, t.columns, factor, scratch, begin, end, begin, end);  // H_I factor
  Floats sum = zero(), curve = zero();
  for (int64_t j = begin; j < end; ++j) {
    const Floats f = load(factor + kRoundLanes * j);
    sum = fma(f, load(slopes + kRoundLanes * j), sum);
    curve = fma(f, load(scratch + kRoundLanes * j), curve);
  }
  alignas(64) float gains[kRoundLanes], curves[kRoundLanes];
  store(curves, curve);
  for (int r = 0; r < int(t.rows); ++r) {
    float* number = numbers + r * blocks + n;
    const float before = *number, bend = among.at[r][r] * curves[r];
    if (!(bend > 0.0f) || (positive && !(before > 0.0f))) continue;
    store(gains, sum);
    const float next = round_scale(before + gains[r] / bend, t.scale_type);
    if (!(next - next == 0.0f) || (positive && !(next > 0.0f))) continue;
    const float step = next - before;
    if (!(2.0f * step * gains[r] - step * step * bend > 0.0f)) continue;  // rounding may have undone it
    *number = next;
    Floats shared = zero();  // what the slopes of all rows' numbers hear of it
    for (int64_t j = begin; j < end; ++j) {
      const float moved = step * scratch[kRoundLanes * j + r];
      store(slopes + kRoundLanes * j, fma(among.of(r), broadcast(-moved), load(slopes + kRoundLanes * j)));
      shared = fma(load(factor + kRoundLanes * j), broadcast(-moved), shared);
      change[kRoundLanes * j + r] += step * factor[kRoundLanes * j + r];
    }
    sum = fma(among.of(r), shared, sum);
  }
}

// The codes of columns [begin, end), from the last to the first.
inline void move_codes(const DescentTask& t, const Search& search, const Rows& among, const uint8_t* level_of_code,
                       const float* slopes, float* change, float* heard, int64_t begin, int64_t end, int64_t n) {
  const int64_t columns = t.columns, blocks = (columns + t.block - 1) / t.block;
  alignas(64) float scales[kRoundLanes] = {}, inverses[kRoundLanes] = {}, offsets[kRoundLanes] = {};
  for (int r = 0; r < int(t.rows); ++r) {
    scales[r] = t.scales[r * blocks + n];
    inverses[r] = reciprocal(scales[r]);
    if (t.offsets) offsets[r] = t.offsets[r * blocks + n];
  }
  for (int64_t j = begin; j < end; ++j) store(heard + kRoundLanes * j, zero());
  for (int64_t tile_end = end; tile_end > begin;) {
    const int64_t tile = tile_end - begin > kRoundTile ? tile_end - kRoundTile : begin;
    // `change` holds moves of scales too, which the slopes have heard of: moves of codes are kept apart, below it.
    float* moves = heard + kRoundLanes * columns;
    if (tile_end < end) hear(t.inputs, columns, moves, heard, tile, tile_end, tile_end, end);
    for (int64_t j = tile_end - 1; j >= tile; --j) {
      const float weight = t.inputs[j * columns + j];
      Floats slope = among.heard(load(slopes + kRoundLanes * j), heard + kRoundLanes * j);
      alignas(64) float slope_now[kRoundLanes], moved[kRoundLanes] = {};
      bool any = false;
      for (int r = 0; r < int(t.rows); ++r) {
        const float bend = among.at[r][r] * weight;
        if (!(scales[r] > 0.0f) || !(bend > 0.0f)) continue;
        store(slope_now, slope);
        uint8_t* code = t.codes + r * columns + j;
        const float before = search.levels[level_of_code[*code]] * scales[r] + offsets[r];
        const int level = search.nearest((before + slope_now[r] / bend - offsets[r]) * inverses[r]);
        const float step = search.levels[level] * scales[r] + offsets[r] - before;
        if (!(2.0f * step * slope_now[r] - step * step * bend > 0.0f)) continue;
        *code = t.grid->codes[level];
        moved[r] = step;
        any = true;
        slope = fma(among.of(r), broadcast(-step * weight), slope);
      }
      const Floats move = load(moved);
      store(moves + kRoundLanes * j, move);
      if (!any) continue;
      store(change + kRoundLanes * j, add(load(change + kRoundLanes * j), move));
      for (int64_t i = tile; i < j; ++i) {
        store(heard + kRoundLanes * i, fma(broadcast(t.inputs[j * columns + i]), move, load(heard + kRoundLanes * i)));
      }
    }
    tile_end = tile;
  }
}

void descend_rows(const DescentTask& t) {
  const Search search(*t.grid);
  const Rows among(t);
  uint8_t level_of_code[256] = {};
  for (size_t level = 0; level < t.grid->codes.size(); ++level) level_of_code[t.grid->codes[level]] = uint8_t(level);
  const int64_t columns = t.columns, block = t.block, blocks = (columns + block - 1) / block;
  float* slopes = t.scratch;                       // (columns, 16)
  float* change = slopes + kRoundLanes * columns;  // (columns, 16)
  float* factor = change + kRoundLanes * columns;  // (columns, 16): levels, then ones
  float* heard = factor + kRoundLanes * columns;   // (2 columns, 16)
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < kRoundLanes; ++r) {
      slopes[kRoundLanes * j + r] = r < t.rows ? t.slopes[r * columns + j] : 0.0f;
      change[kRoundLanes * j + r] = 0.0f;
    }
  }
  for (int64_t n = blocks - 1; n >= 0; --n) {
    const int64_t begin = n * block, end = begin + block < columns ? begin + block : columns;
    for (int64_t j = begin; j < end; ++j) store(heard + kRoundLanes * j, zero());
    hear(t.inputs, columns, change, heard, begin, end, end, columns);
    for (int64_t j = begin; j < end; ++j) {
      store(slopes + kRoundLanes * j, among.heard(load(slopes + kRoundLanes * j), heard + kRoundLanes * j));
    }
    if (!t.fixed_scales) {
      for (int64_t j = begin; j < end; ++j) {
        for (int r = 0; r < kRoundLanes; ++r) {
          factor[kRoundLanes * j + r] = r < t.rows ? search.levels[level_of_code[t.codes[r * columns + j]]] : 0.0f;
        }
      }
      move_number(t, among, factor, slopes, change, heard, begin, end, n, t.scales, true);
      if (t.asymmetric) {
        for (int64_t j = begin; j < end; ++j) store(factor + kRoundLanes * j, broadcast(1.0f));
        move_number(t, among, factor, slopes, change, heard, begin, end, n, t.offsets, false);
      }
    }
    move_codes(t, search, among, level_of_code, slopes, change, heard, begin, end, n);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < int(t.rows); ++r) t.change[r * columns + j] = change[kRoundLanes * j + r];
  }
}

}  // namespace
