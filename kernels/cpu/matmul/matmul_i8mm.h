// The int8 matmul for many rows of x on Arm's matrix instruction: SMMLA multiplies 2 rows of x by 2 rows of W over 8
// columns, twice what SDOT does. Decoded weights (unpack.h) lie quad by quad; two quads of 16 rows are re-paired to
//
//     row 0: 8 columns, row 1: 8 columns | row 2, row 3 | .. | row 14, row 15
//
// once per stretch. Integers are exact, and they are scaled in the steps of matmul.h, so results are the same bits.
#pragma once

#include "matmul/matmul.h"

namespace {

// 128 bytes at a time, in place.
inline void pair_rows(uint8_t* levels, int64_t bytes) {
  for (uint8_t* end = levels + bytes; levels < end; levels += 128) {
    const Bytes first = load_bytes(levels), second = load_bytes(levels + 64);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t a = vreinterpretq_u32_u8(first.q[i]), b = vreinterpretq_u32_u8(second.q[i]);
      vst1q_u8(levels + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
      vst1q_u8(levels + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    }
  }
}

// Sums of 2 rows of x with 16 of W: pair[j] holds (row 0, row 1) x (2j, 2j + 1).
struct PairSums {
  int32x4_t pair[8];

  void clear() { for (int32x4_t& p : pair) p = vdupq_n_s32(0); }
  void add(int8x16_t x, const uint8_t* levels) {
    for (int j = 0; j < 8; ++j) pair[j] = vmmlaq_s32(pair[j], x, vreinterpretq_s8_u8(vld1q_u8(levels + 16 * j)));
  }
  Ints of_row(int row) const {
    Ints sums;
    for (int i = 0; i < 4; ++i) {
      const int64x2_t a = vreinterpretq_s64_s32(pair[2 * i]), b = vreinterpretq_s64_s32(pair[2 * i + 1]);
      sums.q[i] = vreinterpretq_s32_s64(row ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
    }
    return sums;
  }
};

// `rows` rows of x, 2 kPairs or one less (the last is then computed twice), against tiles [begin, end) of a panel.
template <int kPairs, bool kTwoDigits>
void int8_pairs(const MatmulTask& task, const uint8_t* high, const uint8_t* low, int64_t panel, int64_t begin,
                int64_t end, int64_t row, int rows) {
  const Matrix& w = *task.w;
  const int64_t column = begin * 64, first_segment = column / w.segment;
  const int octets = w.segment / 8;
  const float inverse = 1.0f / w.level_scale;
  const int8_t* codes[2 * kPairs];
  Floats total[2 * kPairs];
  float* out = task.out + (row - task.row_begin) * task.out_stride + (panel - task.panel_begin) * 16;
  for (int r = 0; r < 2 * kPairs; ++r) {
    const int from = r < rows ? r : rows - 1;
    codes[r] = task.x.codes + (row + from) * task.x.codes_stride + column;
    total[r] = begin == 0 ? zero() : load(out + from * task.out_stride);
  }
  BlockWalk walk(w, column);
  for (int64_t s = 0; s < (end - begin) * 64 / w.segment; ++s) {
    PairSums dot[kPairs], fine[kPairs];
    for (int p = 0; p < kPairs; ++p) {
      dot[p].clear();
      if constexpr (kTwoDigits) fine[p].clear();
    }
    for (int64_t k = s * octets; k < (s + 1) * octets; ++k) {
      for (int p = 0; p < kPairs; ++p) {
        const int8x16_t x = vcombine_s8(vld1_s8(codes[2 * p] + 8 * k), vld1_s8(codes[2 * p + 1] + 8 * k));
        dot[p].add(x, high + 128 * k);
        if constexpr (kTwoDigits) fine[p].add(x, low + 128 * k);
      }
    }
    const int64_t block = walk.next();
    const Floats scale = load_scales(w, w.scales, panel, block);
    for (int r = 0; r < rows; ++r) {
      const int64_t segment = (row + r) * task.x.segments_stride + first_segment + s;
      const float x_scale = task.x.scales[segment];
      Floats value = to_float(dot[r / 2].of_row(r % 2));
      if constexpr (kTwoDigits) {
        value = fma(to_float(fine[r / 2].of_row(r % 2)), broadcast(1.0f / kbit::kLowSteps), value);
      }
      total[r] = fma(value, mul(scale, broadcast(x_scale)), total[r]);
      if (w.offsets) {
        const Floats offset = load_scales(w, w.offsets, panel, block);
        total[r] = fma(offset, broadcast(x_scale * float(task.x.sums[segment]) * inverse), total[r]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    store(out + r * task.out_stride, end == w.tiles ? mul(total[r], broadcast(w.level_scale)) : total[r]);
}

template <bool kTwoDigits> void int8_paired(const MatmulTask& task) {
  const Matrix& w = *task.w;
  constexpr int64_t kTiles = kBufferColumns / 64;
  uint8_t *high = task.scratch, *low = task.scratch + kTiles * 1024;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    for (int64_t begin = 0; begin < w.tiles; begin += kTiles) {
      const int64_t end = begin + kTiles < w.tiles ? begin + kTiles : w.tiles, bytes = (end - begin) * 1024;
      expand_levels(w, panel, begin, end, w.high, high);
      pair_rows(high, bytes);
      if constexpr (kTwoDigits) {
        expand_levels(w, panel, begin, end, w.low, low);
        pair_rows(low, bytes);
      }
      // 16 registers of sums for two pairs; two digits have as many for one.
      constexpr int kPairs = kTwoDigits ? 1 : 2;
      int64_t row = task.row_begin;
      for (; row + 2 * (kPairs - 1) < task.row_end; row += 2 * kPairs) {
        const int rows = task.row_end - row < 2 * kPairs ? int(task.row_end - row) : 2 * kPairs;
        int8_pairs<kPairs, kTwoDigits>(task, high, low, panel, begin, end, row, rows);
      }
      if (row < task.row_end) {
        int8_pairs<1, kTwoDigits>(task, high, low, panel, begin, end, row, int(task.row_end - row));
      }
    }
  }
}

void matmul_int8_i8mm(const MatmulTask& task) {
  static_assert(kDirectRows >= kbit::kRowsWithoutScratch);
  if (task.row_end - task.row_begin <= kDirectRows) return matmul_int8(task);
  task.w->two_digits ? int8_paired<true>(task) : int8_paired<false>(task);
}

}  // namespace
