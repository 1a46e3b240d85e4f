// Operations on single rows of activations: norms, activations, int8 quantization, lookups.
#pragma once

#include <math.h>

#include "isa/kernels.h"
#include "codecs/unpack.h"
#include "program/elementary.h"

namespace {

using kbit::Activation;

inline int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

void quantize_row(const float* x, int64_t columns, int segment, int8_t* codes, float* scales, int32_t* sums) {
  const int64_t segments = padded(columns) / segment;
  for (int64_t s = 0; s < segments; ++s, x += segment, codes += segment) {
    Floats largest = abs(load(x));
    for (int i = 16; i < segment; i += 16) largest = max(largest, abs(load(x + i)));
    const float peak = reduce_max(largest);
    // Below this the reciprocal would overflow; such a segment is zero for every purpose.
    const bool zeros = !(peak > 1e-36f);
    const Floats inverse = broadcast(zeros ? 0.0f : 127.0f / peak);
    Ints sum = broadcast(0);
    for (int i = 0; i < segment; i += 16) {
      const Ints code = round_to_int(mul(load(x + i), inverse));
      store_low_bytes(codes + i, code);
      sum = add(sum, code);
    }
    scales[s] = zeros ? 0.0f : peak / 127.0f;
    sums[s] = int32_t(reduce_add(to_float(sum)));  // exact: at most 64 * 127
  }
}

void rms_norm(const float* x, const float* weight, int64_t columns, float eps, float* out) {
  Floats squares = zero();
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) squares = fma(load(x + k), load(x + k), squares);
  const int rest = int(columns - k);
  if (rest) squares = fma(load_first(x + k, rest), load_first(x + k, rest), squares);
  const Floats factor = broadcast(1.0f / sqrtf(reduce_add(squares) / float(columns) + eps));
  for (k = 0; k + 16 <= columns; k += 16) store(out + k, mul(load(weight + k), mul(load(x + k), factor)));
  if (rest) {
    store(out + k, mul(load_first(weight + k, rest), mul(load_first(x + k, rest), factor)));
    k += 16;
  }
  for (; k < padded(columns); k += 16) store(out + k, zero());
}

void add_row(const float* x, float* out, int64_t count) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store(out + k, add(load(out + k), load(x + k)));
  const int rest = int(count - k);
  if (rest) store_first(out + k, add(load_first(out + k, rest), load_first(x + k, rest)), rest);
}

inline Floats activate(Floats x, Activation kind) {
  const Floats one = broadcast(1.0f);
  switch (kind) {
    case Activation::silu: return div(x, add(one, exponential(sub(zero(), x))));
    case Activation::gelu_tanh: {
      // x / 2 (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
      const Floats cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
      return div(x, add(one, exponential(mul(cubic, broadcast(-1.5957691216057308f)))));
    }
    case Activation::gelu: {
      float lanes[16];
      store(lanes, x);
      for (float& v : lanes) v = 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
      return load(lanes);
    }
    case Activation::relu: return max(x, zero());
    case Activation::elu: return add(max(x, zero()), exponential_less_one(min(x, zero())));
    case Activation::sigmoid: return div(one, add(one, exponential(sub(zero(), x))));
    default: return x;
  }
}

void activate_row(const float* gate, const float* up, float* out, int64_t count, Activation kind) {
  for (int64_t k = 0; k < count; k += 16) {
    const int n = count - k < 16 ? int(count - k) : 16;
    Floats value = activate(load_first(gate + k, n), kind);
    if (up) value = mul(value, load_first(up + k, n));
    store_first(out + k, value, n);
  }
}

void soft_cap_row(float* x, int64_t count, float cap) {
  for (int64_t k = 0; k < count; k += 16) {
    const int n = count - k < 16 ? int(count - k) : 16;
    store_first(x + k, soft_capped(load_first(x + k, n), cap), n);
  }
}

// The code of (row, column) from the bit planes; for lookups of single rows.
inline int code_at(const Matrix& w, int64_t row, int64_t column) {
  const int64_t quad = column % 32 / 4, byte = row % 16 * 4 + column % 4;
  if (w.apart) {
    const int64_t half = row / 16 * w.tiles * 2 + column / 32;
    int found = w.codes[half * 128 + quad / 4 * 64 + byte] >> (quad % 4 * 2) & 3;
    for (int bit = 2; bit < w.bits; ++bit) found |= (w.further[bit - 2][half * 64 + byte] >> quad & 1) << bit;
    return found;
  }
  const uint8_t* plane = w.codes + row / 16 * w.panel_bytes() + column / 32 * (w.tile_bytes() / 2);
  int code = 0, position = 0;
  for (int width = 8; width > 0; width /= 2) {
    if (!(w.bits & width)) continue;
    const int fields = 8 / width;
    const int field = int(quad % fields);
    code |= ((plane[quad / fields * 64 + byte] >> (field * width)) & ((1 << width) - 1)) << position;
    position += width;
    plane += 512 / fields;
  }
  return code;
}

inline float number_at(const void* p, int64_t index, Number kind) {
  if (kind == Number::half) return half_to_float(static_cast<const uint16_t*>(p)[index]);
  if (kind == Number::single) return static_cast<const float*>(p)[index];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[index]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Scale, or offset, of one row's block.
inline float scale_at(const Matrix& w, const void* p, int64_t panel, int64_t block, int64_t lane) {
  if (w.scale_kind != Number::steps) return number_at(p, (panel * w.blocks + block) * 16 + lane, w.scale_kind);
  float lanes[16];
  store(lanes, load_scales(w, p, panel, block));
  return lanes[lane];
}

// Columns k times rotation[k], then, in each stretch of w.mixed of them, sums and differences of the two halves, of their
// halves, and so on: the Hadamard transform. Those of 16 neighbours stay in a vector.
void rotate_row(const Matrix& w, const float* x, float* out) {
  const int64_t columns = (w.columns + 15) / 16 * 16;
  alignas(64) float signs[4][16];
  for (int i = 0; i < 16; ++i)
    for (int bit = 0; bit < 4; ++bit) signs[bit][i] = i >> bit & 1 ? -1.0f : 1.0f;
  const Floats one = load(signs[0]), two = load(signs[1]), four = load(signs[2]), eight = load(signs[3]);
  for (int64_t k = 0; k < columns; k += 16) {
    Floats v = mul(load(x + k), load(w.rotation + k));
    v = fma(v, one, swap_lanes<1>(v));
    v = fma(v, two, swap_lanes<2>(v));
    v = fma(v, four, swap_lanes<4>(v));
    store(out + k, fma(v, eight, swap_lanes<8>(v)));
  }
  for (int64_t half = 16; half < w.mixed; half *= 2) {
    for (int64_t first = 0; first < columns; first += 2 * half) {
      for (int64_t k = first; k < first + half; k += 16) {
        const Floats a = load(out + k), b = load(out + k + half);
        store(out + k, add(a, b));
        store(out + k + half, sub(a, b));
      }
    }
  }
  for (int64_t k = columns; k < padded(columns); ++k) out[k] = 0.0f;
}

void decode_row(const Matrix& w, int64_t row, float* out) {
  const int64_t panel = row / 16, lane = row % 16;
  for (int64_t k = 0; k < w.columns; ++k) {
    if (w.bits == 0) {
      out[k] = number_at(w.values, ((panel * w.tiles * 64) + k) * 16 + lane, w.value_kind);
      continue;
    }
    const int64_t block = k / w.block;
    const float value = w.codebook[code_at(w, row, k)] * scale_at(w, w.scales, panel, block, lane);
    out[k] = w.offsets ? value + scale_at(w, w.offsets, panel, block, lane) : value;
  }
}

}  // namespace
