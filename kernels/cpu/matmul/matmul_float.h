// x W^T in floating point: fp32 for quantized and dense weights, bf16 (products of bfloat16, sums in fp32) where the
// instruction set multiplies it. Dense weights lie as [panel][column][16 rows]; quantized ones are decoded to that
// order, a stretch of columns at a time.
#pragma once

#include "codecs/unpack_trellis.h"
#include "matmul/matmul.h"

namespace {

// Columns of a panel decoded at once: 16 rows x 256 columns x 4 bytes x 2 panels is 32 KB.
constexpr int64_t kFloatColumns = 256;

void expand_floats(const Matrix& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  if (w.code != Code::planes) return expand_trellis_floats(w, panel, begin, end, out);
  switch (w.bits) {
    case 2: return expand_floats<2>(w, panel, begin, end, out);
    case 3: return expand_floats<3>(w, panel, begin, end, out);
    case 4: return expand_floats<4>(w, panel, begin, end, out);
    case 5: return expand_floats<5>(w, panel, begin, end, out);
    case 6: return expand_floats<6>(w, panel, begin, end, out);
    case 7: return expand_floats<7>(w, panel, begin, end, out);
    case 8: return expand_floats<8>(w, panel, begin, end, out);
    default:
      for (int64_t k = begin * 64; k < end * 64; ++k, out += 16)
        store(out, load_number(w.values, (panel * w.tiles * 64 + k) * 16, w.value_kind));
  }
}

// out += x[:, columns] W[:, columns]^T for kRows rows and kPanels panels, weights at `weights` as stored in Kind;
// panels are panel_stride values apart. Each output is one chain of fma over the columns.
template <int kRows, int kPanels, Number kKind>
void float_tile(const float* x, int64_t x_stride, const void* weights, int64_t panel_stride, int64_t columns, bool first,
                float* out, int64_t out_stride) {
  Floats total[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) total[r][p] = first ? zero() : load(out + r * out_stride + 16 * p);
  for (int64_t k = 0; k < columns; ++k) {
    Floats value[kPanels];
    for (int p = 0; p < kPanels; ++p) value[p] = load_number(weights, p * panel_stride + k * 16, kKind);
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kPanels; ++p) total[r][p] = fma(value[p], broadcast(x[r * x_stride + k]), total[r][p]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) store(out + r * out_stride + 16 * p, total[r][p]);
}

template <Number kKind>
void float_stretch(const MatmulTask& task, const void* weights, int64_t panel_stride, int64_t panel, int64_t panels,
                   int64_t column, int64_t columns) {
  for_row_tiles<kTileRows>(task.row_begin, task.row_end, [&](auto size, int64_t row) {
    constexpr int kRows = decltype(size)::value;
    const float* x = task.x.x + row * task.x.x_stride + column;
    float* out = task.out + (row - task.row_begin) * task.out_stride + (panel - task.panel_begin) * 16;
    if (panels == kTilePanels) {
      float_tile<kRows, kTilePanels, kKind>(x, task.x.x_stride, weights, panel_stride, columns, column == 0, out,
                                            task.out_stride);
    } else {
      for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* one = static_cast<const uint8_t*>(weights) + p * panel_stride * kbit::bytes_of(kKind);
        float_tile<kRows, 1, kKind>(x, task.x.x_stride, one, panel_stride, columns, column == 0, out + 16 * p,
                                    task.out_stride);
      }
    }
  });
}

[[maybe_unused]] void matmul_fp32(const MatmulTask& task) {
  const Matrix& w = *task.w;
  const int64_t columns = w.tiles * 64;
  // Dense weights that meet few rows are used where they lie.
  const bool in_place = w.bits == 0 && (task.row_end - task.row_begin <= kTileRows || w.value_kind == Number::single);
  for (int64_t panel = task.panel_begin; panel < task.panel_end; panel += kTilePanels) {
    const int64_t panels = task.panel_end - panel < kTilePanels ? task.panel_end - panel : kTilePanels;
    if (in_place) {
      const uint8_t* weights = static_cast<const uint8_t*>(w.values) + panel * columns * 16 * kbit::bytes_of(w.value_kind);
      switch (w.value_kind) {
        case Number::half: float_stretch<Number::half>(task, weights, columns * 16, panel, panels, 0, columns); break;
        case Number::bfloat: float_stretch<Number::bfloat>(task, weights, columns * 16, panel, panels, 0, columns); break;
        default: float_stretch<Number::single>(task, weights, columns * 16, panel, panels, 0, columns);
      }
      continue;
    }
    float* buffer = reinterpret_cast<float*>(task.scratch);
    for (int64_t column = 0; column < columns; column += kFloatColumns) {
      const int64_t end = column + kFloatColumns < columns ? column + kFloatColumns : columns;
      const int64_t stride = (end - column) * 16;
      for (int64_t p = 0; p < panels; ++p) expand_floats(w, panel + p, column / 64, end / 64, buffer + p * stride);
      float_stretch<Number::single>(task, buffer, stride, panel, panels, column, end - column);
    }
  }
}

// Weights as floats lie with 16 rows to a vector, so a vector of sums is of one column, lane by lane over the panels in
// ascending order, and its lanes are added last: the same roundings however many rows of x there are.
[[maybe_unused]] void matmul_backward(const kbit::BackwardTask& t) {
  const Matrix& w = *t.w;
  const int64_t panels = t.panel_end - t.panel_begin;
  const int64_t most = kbit::kBackwardPanels / panels;  // tiles of so many panels that fit
  float* weights = reinterpret_cast<float*>(t.scratch);
  for (int64_t tile = t.tile_begin; tile < t.tile_end; tile += most) {
    const int64_t stop = tile + most < t.tile_end ? tile + most : t.tile_end, first = tile * 64;
    const int64_t stride = (stop - tile) * 64 * 16;
    for (int64_t p = 0; p < panels; ++p) expand_floats(w, t.panel_begin + p, tile, stop, weights + p * stride);
    const int64_t columns = stop * 64 < w.columns ? stop * 64 - first : w.columns - first;
    for (int64_t row = 0; row < t.rows; ++row) {
      const float* x = t.x + row * t.x_stride;
      float* out = t.out + row * t.out_stride + first;
      for (int64_t k = 0; k < columns; k += 16) {
        Floats sum[16];
        for (int i = 0; i < 16; ++i) sum[i] = zero();
        for (int64_t p = 0; p < panels; ++p) {
          const Floats value = load(x + 16 * p);
          const float* from = weights + p * stride + k * 16;
          repeat<16>([&]<int I>() __attribute__((always_inline)) { sum[I] = fma(load(from + 16 * I), value, sum[I]); });
        }
        alignas(64) float sums[16];
        for (int i = 0; i < 16; ++i) sums[i] = reduce_add(sum[i]);
        store(out + k, load(sums));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- bf16

// 16 columns' worth of floats to bfloat16 (nearest, ties to even; finite input).
inline uint16_t to_bfloat(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Ints to_bfloat(Floats a) {
  const Ints bits = bits_of(a);
  const Ints odd = and_bits(shift_right<16>(bits), 1);
  return shift_right<16>(add(add(bits, broadcast(0x7fff)), odd));
}

[[maybe_unused]] void bfloat_row(const float* x, int64_t columns, uint16_t* out) {
  for (int64_t k = 0; k < columns; ++k) out[k] = to_bfloat(x[k]);
}

// Two columns of 16 rows as pairs of bfloat16: the lane of a row holds (k, k + 1).
inline void pair_columns(const float* columns, int64_t count, uint8_t* out) {
  for (int64_t k = 0; k < count; k += 2, columns += 32, out += 64)
    store_bytes(out, as_bytes(or_bits(to_bfloat(load(columns)), shift_left<16>(to_bfloat(load(columns + 16))))));
}

#ifdef __AVX512BF16__

template <int kRows, int kPanels>
void bf16_tile(const uint16_t* x, int64_t x_stride, const uint8_t* weights, int64_t panel_bytes, int64_t pairs,
               bool first, float* out, int64_t out_stride) {
  Floats total[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) total[r][p] = first ? zero() : load(out + r * out_stride + 16 * p);
  for (int64_t k = 0; k < pairs; ++k) {
    Bytes value[kPanels];
    for (int p = 0; p < kPanels; ++p) value[p] = load_bytes(weights + p * panel_bytes + k * 64);
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kPanels; ++p) total[r][p] = dot2(total[r][p], value[p], x + r * x_stride + 2 * k);
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) store(out + r * out_stride + 16 * p, total[r][p]);
}

[[maybe_unused]] void matmul_bf16(const MatmulTask& task) {  // AMX has its own
  const Matrix& w = *task.w;
  const int64_t columns = w.tiles * 64;
  float* floats = reinterpret_cast<float*>(task.scratch);
  uint8_t* buffer = task.scratch + kFloatColumns * 64;
  const uint16_t* rows = reinterpret_cast<const uint16_t*>(task.x.codes);
  const int64_t x_stride = task.x.codes_stride / 2;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; panel += kTilePanels) {
    const int64_t panels = task.panel_end - panel < kTilePanels ? task.panel_end - panel : kTilePanels;
    for (int64_t column = 0; column < columns; column += kFloatColumns) {
      const int64_t end = column + kFloatColumns < columns ? column + kFloatColumns : columns;
      const int64_t bytes = (end - column) * 32;
      for (int64_t p = 0; p < panels; ++p) {
        expand_floats(w, panel + p, column / 64, end / 64, floats);
        pair_columns(floats, end - column, buffer + p * bytes);
      }
      for_row_tiles<kTileRows>(task.row_begin, task.row_end, [&](auto size, int64_t row) {
        constexpr int kRows = decltype(size)::value;
        const uint16_t* x = rows + row * x_stride + column;
        float* out = task.out + (row - task.row_begin) * task.out_stride + (panel - task.panel_begin) * 16;
        if (panels == kTilePanels) {
          bf16_tile<kRows, kTilePanels>(x, x_stride, buffer, bytes, (end - column) / 2, column == 0, out, task.out_stride);
        } else {
          for (int64_t p = 0; p < panels; ++p)
            bf16_tile<kRows, 1>(x, x_stride, buffer + p * bytes, bytes, (end - column) / 2, column == 0, out + 16 * p,
                                task.out_stride);
        }
      });
    }
  }
}

#else

void (*const matmul_bf16)(const MatmulTask&) = nullptr;

#endif

}  // namespace
