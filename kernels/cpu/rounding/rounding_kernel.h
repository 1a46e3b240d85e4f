// The kernel behind rounding.h, over the vector interface: a lane is a row.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rounding/rounding.h"
#include "simd/repeat.h"

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

// To what a scale's type holds, 16 at once.
inline Floats round_scales(Floats values, ScaleType type) {
  if (type == ScaleType::single) return values;
  if (type == ScaleType::half) {
    alignas(64) uint16_t halves[kRoundLanes];
    store_half(halves, values);
    return load_half(halves);
  }
  const Ints bits = bits_of(values), odd = and_bits(shift_right<16>(bits), 1);
  return from_bits(and_bits(add(add(bits, broadcast(int32_t(0x7fff))), odd), int32_t(0xffff0000)));
}

// A grid's levels, and which of them is nearest to a value in units of the scale: its index counts the borders below.
struct Search {
  const float* levels;
  const float* borders;
  const uint8_t* starts;
  int most_in_cell, top_cell;
  float half_cells;

  explicit Search(const Grid& grid)
      : levels(grid.levels.data()), borders(grid.borders.data()), starts(grid.starts.data()),
        most_in_cell(grid.most_in_cell), top_cell(int(grid.starts.size()) - 1),
        half_cells(float(grid.starts.size()) / 2) {}

  // From the borders below the value's cell on. Without branches, which would be taken at random.
  int nearest(float x) const {
    float place = x * half_cells + half_cells;
    place = place > 0.0f ? place : 0.0f;  // NaN too
    const int cell = place < float(top_cell) ? int(place) : top_cell;
    int level = starts[cell];
    for (int i = 0; i < most_in_cell; ++i) level += x > borders[level];
    return level;
  }

  // The same in every lane. kIndexBits: of grids with up to 2^kIndexBits levels, which are bisected; 0: of wider ones.
  template <int kIndexBits> Ints nearest(Floats x) const {
    if constexpr (kIndexBits > 0) {
      x = min(max(x, broadcast(-kFarAway)), broadcast(kFarAway));  // NaN is below all borders
      Ints level = broadcast(int32_t(0));
      repeat<kIndexBits>([&]<int kStep>() __attribute__((always_inline)) {
        constexpr int kBit = kIndexBits - 1 - kStep;
        const Floats border = lookup<kIndexBits>(borders, add(level, broadcast(int32_t((1 << kBit) - 1))));
        level = add(level, shift_left<kBit>(shift_right<31>(bits_of(sub(border, x)))));  // its sign: border < x
      });
      return level;
    } else {
      alignas(64) float each[kRoundLanes];
      alignas(64) int32_t found[kRoundLanes];
      store(each, x);
      for (int r = 0; r < kRoundLanes; ++r) found[r] = nearest(each[r]);
      return load_ints(found);
    }
  }

  template <int kIndexBits> Floats level(Ints index) const {
    return lookup<kIndexBits ? kIndexBits : 8>(levels, index);
  }

 private:
  static constexpr float kFarAway = 1e38f;  // less than the borders that fill the table up
};

inline float reciprocal(float scale) { return scale > 0.0f ? 1.0f / (scale > 1e-38f ? scale : 1e-38f) : 0.0f; }

inline Floats reciprocals(const float* scales) {
  alignas(64) float found[kRoundLanes];
  for (int r = 0; r < kRoundLanes; ++r) found[r] = reciprocal(scales[r]);
  return load(found);
}

// What scales and offsets make of a block of 16 rows, and the sums from which better ones follow.
struct Fit {
  alignas(64) float error[kRoundLanes];  // sum w (x - s c - o)^2
  // Sums of w c, w c^2, w x, w c x; and of w.
  alignas(64) float level[kRoundLanes], square[kRoundLanes], value[kRoundLanes], level_value[kRoundLanes];
  float weight;
};

// x: (count, 16).
template <int kIndexBits>
inline void fit_block(const Search& search, const float* x, const float* w, int64_t count, const float* scales,
                      const float* offsets, Fit& fit) {
  const Floats scale = load(scales), offset = load(offsets), inverse = reciprocals(scales);
  Floats error = zero(), level = zero(), square = zero(), value = zero(), level_value = zero();
  float weight = 0;
  for (int64_t j = 0; j < count; ++j) {
    const Floats here = load(x + kRoundLanes * j), moved = sub(here, offset), wj = broadcast(w[j]);
    const Floats c = search.level<kIndexBits>(search.nearest<kIndexBits>(mul(moved, inverse)));
    const Floats wc = mul(wj, c), d = sub(moved, mul(scale, c));
    error = add(error, mul(mul(wj, d), d));
    level = add(level, wc);
    square = add(square, mul(wc, c));
    value = add(value, mul(wj, here));
    level_value = add(level_value, mul(wc, here));
    weight += w[j];
  }
  store(fit.error, error);
  store(fit.level, level);
  store(fit.square, square);
  store(fit.value, value);
  store(fit.level_value, level_value);
  fit.weight = weight;
}

inline void take_row(Fit& to, const Fit& from, int r) {
  to.error[r] = from.error[r];
  to.level[r] = from.level[r];
  to.square[r] = from.square[r];
  to.value[r] = from.value[r];
  to.level_value[r] = from.level_value[r];
}

// The scales (and offsets) of `count` columns of 16 rows: the best of the shares, then least squares. x: (count, 16).
template <int kIndexBits>
inline void choose_scales(const RoundTask& t, const Search& search, const float* x, const float* w, int64_t count,
                          float* scales, float* offsets) {
  Floats low = load(x), high = low;
  for (int64_t j = 1; j < count; ++j) {
    const Floats here = load(x + kRoundLanes * j);
    low = min(here, low);
    high = max(here, high);
  }
  const Floats half = broadcast(0.5f);
  const Floats span = t.asymmetric ? sub(mul(high, half), mul(low, half)) : max(high, mul(low, broadcast(-1.0f)));
  alignas(64) float middles[kRoundLanes], tried[kRoundLanes], moved[kRoundLanes];
  store(middles, t.asymmetric ? round_scales(add(mul(high, half), mul(low, half)), t.scale_type) : zero());
  store(scales, round_scales(span, t.scale_type));
  store(offsets, load(middles));
  Fit best, fit;
  fit_block<kIndexBits>(search, x, w, count, scales, middles, best);
  for (int64_t i = 0; i < t.share_count; ++i) {
    store(tried, round_scales(mul(span, broadcast(t.shares[i])), t.scale_type));
    fit_block<kIndexBits>(search, x, w, count, tried, middles, fit);
    for (int r = 0; r < kRoundLanes; ++r) {
      if (!(fit.error[r] < best.error[r])) continue;
      take_row(best, fit, r);
      scales[r] = tried[r];
    }
  }
  bool goes_on[kRoundLanes];
  for (bool& row : goes_on) row = true;
  for (int step = 0; step < (t.share_count ? kFitSteps : 0); ++step) {
    bool any = false;
    for (int r = 0; r < kRoundLanes; ++r) {
      tried[r] = scales[r];
      moved[r] = offsets[r];
      if (!goes_on[r]) continue;
      goes_on[r] = false;
      float next, to = 0.0f;
      if (t.asymmetric) {
        const float det = best.weight * best.square[r] - best.level[r] * best.level[r];
        if (!(det > 1e-12f * best.weight * best.square[r])) continue;
        next = (best.weight * best.level_value[r] - best.level[r] * best.value[r]) / det;
        to = round_scale((best.square[r] * best.value[r] - best.level[r] * best.level_value[r]) / det, t.scale_type);
      } else {
        if (!(best.square[r] > 0.0f)) continue;
        next = best.level_value[r] / best.square[r];
      }
      next = round_scale(next, t.scale_type);
      if (!(next > 0.0f) || !(next < INFINITY) || !(to - to == 0.0f)) continue;
      tried[r] = next;
      moved[r] = to;
      any = goes_on[r] = true;
    }
    if (!any) break;
    fit_block<kIndexBits>(search, x, w, count, tried, moved, fit);
    for (int r = 0; r < kRoundLanes; ++r) {
      if (!goes_on[r]) continue;
      goes_on[r] = fit.error[r] < best.error[r];
      if (!goes_on[r]) continue;
      take_row(best, fit, r);
      scales[r] = tried[r];
      offsets[r] = moved[r];
    }
  }
}

// Columns that hear of an error together: independent sums, as many as hide the latency of fma where a vector is one
// register.
constexpr int kHeardTogether = kTileRows * kTilePanels >= 12 ? 8 : 4;

// heard[j] += sum over k in [from, to) of table[j][k] error[k], for the columns j in [begin, end).
inline void hear(const float* table, int64_t columns, const float* error, float* heard, int64_t begin, int64_t end,
                 int64_t from, int64_t to) {
  int64_t j = begin;
  for (; j + kHeardTogether <= end; j += kHeardTogether) {
    const float* row = table + j * columns;
    Floats sums[kHeardTogether];
    for (int i = 0; i < kHeardTogether; ++i) sums[i] = load(heard + kRoundLanes * (j + i));
    for (int64_t k = from; k < to; ++k) {
      const Floats e = load(error + kRoundLanes * k);
      for (int i = 0; i < kHeardTogether; ++i) sums[i] = fma(broadcast(row[i * columns + k]), e, sums[i]);
    }
    for (int i = 0; i < kHeardTogether; ++i) store(heard + kRoundLanes * (j + i), sums[i]);
  }
  for (; j < end; ++j) {
    const float* row = table + j * columns;
    Floats a = load(heard + kRoundLanes * j);
    for (int64_t k = from; k < to; ++k) a = fma(broadcast(row[k]), load(error + kRoundLanes * k), a);
    store(heard + kRoundLanes * j, a);
  }
}

template <int kIndexBits> void round_rows(const RoundTask& t) {
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
    alignas(64) float scales[kRoundLanes] = {}, offsets[kRoundLanes] = {};
    if (t.given_scales && !t.blocks_of) {
      for (int r = 0; r < int(t.rows); ++r) {
        scales[r] = t.given_scales[r * blocks + n];
        if (t.asymmetric) offsets[r] = t.given_offsets[r * blocks + n];
      }
    } else if (!t.blocks_of) {
      float* x = error + kRoundLanes * begin;  // its errors are not known yet: room for the block's targets
      for (int64_t j = begin; j < end; ++j) {
        store(x + kRoundLanes * (j - begin), add(load(weights + kRoundLanes * j), load(heard + kRoundLanes * j)));
      }
      choose_scales<kIndexBits>(t, search, x, t.importance + begin, end - begin, scales, offsets);
    }
    for (int r = 0; r < int(t.rows) && !t.blocks_of; ++r) {
      t.scales[r * blocks + n] = scales[r];
      if (t.offsets) t.offsets[r * blocks + n] = offsets[r];
    }
    Floats scale = load(scales), inverse = reciprocals(scales), offset = load(offsets);
    for (int64_t tile_end = end; tile_end > begin;) {
      const int64_t tile = tile_end - begin > kRoundTile ? tile_end - kRoundTile : begin;
      if (t.feedback && tile_end < end) hear(t.feedback, columns, error, heard, tile, tile_end, tile_end, end);
      for (int64_t j = tile_end - 1; j >= tile; --j) {
        if (t.blocks_of) {
          for (int r = 0; r < int(t.rows); ++r) {
            const int64_t at = r * blocks + t.blocks_of[j];
            scales[r] = t.given_scales[at];
            if (t.asymmetric) offsets[r] = t.given_offsets[at];
          }
          scale = load(scales);
          inverse = reciprocals(scales);
          offset = load(offsets);
        }
        const Floats target = add(load(weights + kRoundLanes * j), load(heard + kRoundLanes * j));
        const Ints level = search.nearest<kIndexBits>(mul(sub(target, offset), inverse));
        const Floats rounded = add(mul(search.level<kIndexBits>(level), scale), offset);
        alignas(64) int32_t index[kRoundLanes];
        store_ints(index, level);
        for (int r = 0; r < int(t.rows); ++r) t.codes[r * columns + j] = t.grid->codes[index[r]];
        if (t.residual) {
          alignas(64) float left[kRoundLanes];
          store(left, sub(target, rounded));
          for (int r = 0; r < int(t.rows); ++r) t.residual[r * columns + j] = left[r];
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

void round_rows(const RoundTask& t) {
  if (t.grid->codes.size() <= 16) round_rows<4>(t);
  else if (t.grid->codes.size() <= 32) round_rows<5>(t);
  else round_rows<0>(t);
}

}  // namespace
