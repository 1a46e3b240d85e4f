// The kernel behind rounding.h, over the vector interface: a lane is a row.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rounding/rounding.h"

namespace {

using kbit::Grid;
using kbit::RoundTask;
using kbit::ScaleType;

constexpr int kRoundLanes = kbit::kRoundedRows;
constexpr int64_t kRoundTile = 64;    // columns rounded one after another before the others hear of it
constexpr int kFitSteps = 3;          // of least squares, after the best share

inline float round_scale(float value, ScaleType type) {
  if (type == ScaleType::single) return value;
  if (type == ScaleType::half) {
    alignas(64) float in[16] = {value};
    alignas(64) uint16_t out[16];
    store_half(out, load(in));
    store(in, load_half(out));
    return in[0];
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&value, &bits, 4);
  return value;
}

// Which level is nearest to a value in units of the scale.
inline int nearest_level(const float* borders, int last, const uint8_t* starts, float half_cells, int top_cell, float x) {
  float place = x * half_cells + half_cells;
  place = place > 0.0f ? place : 0.0f;  // NaN too
  const int cell = place < float(top_cell) ? int(place) : top_cell;
  int level = starts[cell];
  while (level < last && x > borders[level]) ++level;
  return level;
}

struct Search {
  const float* levels;
  const float* borders;
  const uint8_t* starts;
  int last, top_cell;
  float half_cells;

  explicit Search(const Grid& grid)
      : levels(grid.levels.data()), borders(grid.borders.data()), starts(grid.starts.data()),
        last(int(grid.levels.size()) - 1), top_cell(int(grid.starts.size()) - 1),
        half_cells(float(grid.starts.size()) / 2) {}
  int nearest(float x) const { return nearest_level(borders, last, starts, half_cells, top_cell, x); }
};

inline float reciprocal(float scale) { return scale > 0.0f ? 1.0f / (scale > 1e-38f ? scale : 1e-38f) : 0.0f; }

// What a scale and an offset make of a block, and the sums from which better ones follow.
struct Fit {
  float error;                                        // sum w (x - s c - o)^2
  float weight, level, square, value, level_value;    // sums of w, w c, w c^2, w x, w c x
};

inline Fit fit_block(const Search& search, const float* x, const float* w, int64_t count, float scale, float offset) {
  Fit fit = {0, 0, 0, 0, 0, 0};
  const float inverse = reciprocal(scale);
  for (int64_t j = 0; j < count; ++j) {
    const float c = search.levels[search.nearest((x[j] - offset) * inverse)];
    const float wc = w[j] * c, d = x[j] - offset - scale * c;
    fit.error += w[j] * d * d;
    fit.weight += w[j];
    fit.level += wc;
    fit.square += wc * c;
    fit.value += w[j] * x[j];
    fit.level_value += wc * x[j];
  }
  return fit;
}

// The scale (and offset) of a block of `count` values x with weights w: the best of the shares, then least squares.
inline void choose_scale(const RoundTask& t, const Search& search, const float* x, const float* w, int64_t count,
                         float* scale_out, float* offset_out) {
  float low = x[0], high = x[0];
  for (int64_t j = 1; j < count; ++j) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
  }
  const float span = t.asymmetric ? high / 2 - low / 2 : (high > -low ? high : -low);
  const float middle = t.asymmetric ? round_scale(high / 2 + low / 2, t.scale_type) : 0.0f;
  float scale = round_scale(span, t.scale_type), offset = middle;
  Fit best = fit_block(search, x, w, count, scale, offset);
  for (int64_t i = 0; i < t.share_count; ++i) {
    const float tried = round_scale(span * t.shares[i], t.scale_type);
    const Fit fit = fit_block(search, x, w, count, tried, middle);
    if (fit.error < best.error) { best = fit; scale = tried; }
  }
  for (int step = 0; step < (t.share_count ? kFitSteps : 0); ++step) {
    float next = 0.0f, moved = 0.0f;
    if (t.asymmetric) {
      const float det = best.weight * best.square - best.level * best.level;
      if (!(det > 1e-12f * best.weight * best.square)) break;
      next = (best.weight * best.level_value - best.level * best.value) / det;
      moved = round_scale((best.square * best.value - best.level * best.level_value) / det, t.scale_type);
    } else {
      if (!(best.square > 0.0f)) break;
      next = best.level_value / best.square;
    }
    next = round_scale(next, t.scale_type);
    if (!(next > 0.0f) || !(next < INFINITY) || !(moved - moved == 0.0f)) break;
    const Fit fit = fit_block(search, x, w, count, next, moved);
    if (!(fit.error < best.error)) break;
    best = fit;
    scale = next;
    offset = moved;
  }
  *scale_out = scale;
  *offset_out = offset;
}

// heard[j] += sum over k in [from, to) of table[j][k] error[k], for the columns j in [begin, end).
inline void hear(const float* table, int64_t columns, const float* error, float* heard, int64_t begin, int64_t end,
                 int64_t from, int64_t to) {
  int64_t j = begin;
  for (; j + 4 <= end; j += 4) {
    const float* row = table + j * columns;
    Floats a = load(heard + kRoundLanes * j), b = load(heard + kRoundLanes * (j + 1)), c = load(heard + kRoundLanes * (j + 2)),
           d = load(heard + kRoundLanes * (j + 3));
    for (int64_t k = from; k < to; ++k) {
      const Floats e = load(error + kRoundLanes * k);
      a = fma(broadcast(row[k]), e, a);
      b = fma(broadcast(row[columns + k]), e, b);
      c = fma(broadcast(row[2 * columns + k]), e, c);
      d = fma(broadcast(row[3 * columns + k]), e, d);
    }
    store(heard + kRoundLanes * j, a);
    store(heard + kRoundLanes * (j + 1), b);
    store(heard + kRoundLanes * (j + 2), c);
    store(heard + kRoundLanes * (j + 3), d);
  }
  for (; j < end; ++j) {
    const float* row = table + j * columns;
    Floats a = load(heard + kRoundLanes * j);
    for (int64_t k = from; k < to; ++k) a = fma(broadcast(row[k]), load(error + kRoundLanes * k), a);
    store(heard + kRoundLanes * j, a);
  }
}

void round_rows(const RoundTask& t) {
  const Search search(*t.grid);
  const int64_t columns = t.columns, blocks = (columns + t.block - 1) / t.block;
  // Columns between which the others are heard: those that share a scale, if they stand side by side.
  const int64_t block = t.blocks_of ? kRoundTile : t.block, steps = (columns + block - 1) / block;
  float* weights = t.scratch;                    // (columns, 16)
  float* error = weights + kRoundLanes * columns;      // (columns, 16)
  float* heard = error + kRoundLanes * columns;        // (columns, 16): correction, then what columns to the right add
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < kRoundLanes; ++r) {
      const bool there = r < t.rows;
      weights[kRoundLanes * j + r] = there ? t.weights[r * columns + j] : 0.0f;
      heard[kRoundLanes * j + r] = there && t.correction ? t.correction[r * columns + j] : 0.0f;
    }
  }
  for (int64_t n = steps - 1; n >= 0; --n) {
    const int64_t begin = n * block, end = begin + block < columns ? begin + block : columns;
    if (t.feedback) hear(t.feedback, columns, error, heard, begin, end, end, columns);
    alignas(64) float scales[kRoundLanes] = {}, inverses[kRoundLanes] = {}, offsets[kRoundLanes] = {};
    for (int r = 0; r < int(t.rows) && !t.blocks_of; ++r) {
      const int64_t at = r * blocks + n;
      if (t.given_scales) {
        scales[r] = t.given_scales[at];
        if (t.asymmetric) offsets[r] = t.given_offsets[at];
      } else {
        float* x = error + kRoundLanes * begin;  // its errors are not known yet: room for the block's targets
        for (int64_t j = begin; j < end; ++j) x[j - begin] = weights[kRoundLanes * j + r] + heard[kRoundLanes * j + r];
        choose_scale(t, search, x, t.importance + begin, end - begin, &scales[r], &offsets[r]);
      }
      inverses[r] = reciprocal(scales[r]);
      t.scales[at] = scales[r];
      if (t.offsets) t.offsets[at] = offsets[r];
    }
    for (int64_t tile_end = end; tile_end > begin;) {
      const int64_t tile = tile_end - begin > kRoundTile ? tile_end - kRoundTile : begin;
      if (t.feedback && tile_end < end) hear(t.feedback, columns, error, heard, tile, tile_end, tile_end, end);
      for (int64_t j = tile_end - 1; j >= tile; --j) {
        for (int r = 0; r < int(t.rows) && t.blocks_of; ++r) {
          const int64_t at = r * blocks + t.blocks_of[j];
          scales[r] = t.given_scales[at];
          if (t.asymmetric) offsets[r] = t.given_offsets[at];
          inverses[r] = reciprocal(scales[r]);
        }
        alignas(64) float targets[kRoundLanes], values[kRoundLanes];
        const Floats target = add(load(weights + kRoundLanes * j), load(heard + kRoundLanes * j));
        store(targets, target);
        for (int r = 0; r < kRoundLanes; ++r) {
          const int level = search.nearest((targets[r] - offsets[r]) * inverses[r]);
          values[r] = search.levels[level] * scales[r] + offsets[r];
          if (r < t.rows) t.codes[r * columns + j] = t.grid->codes[level];
        }
        const Floats rounded = load(values);
        if (t.residual) {
          store(targets, sub(target, rounded));
          for (int r = 0; r < int(t.rows); ++r) t.residual[r * columns + j] = targets[r];
        }
        const Floats e = sub(load(weights + kRoundLanes * j), rounded);
        store(error + kRoundLanes * j, e);
        if (t.feedback) {
          for (int64_t i = tile; i < j; ++i) {
            store(heard + kRoundLanes * i, fma(broadcast(t.feedback[i * columns + j]), e, load(heard + kRoundLanes * i)));
          }
        }
      }
      tile_end = tile;
    }
  }
}

}  // namespace
