// What happens to single heads before and after attention: rotary positions, the Hadamard rotation and the codes of a
// quantized cache, and writing into the cache. kernels/reference.py (rope, quantize_kv) says what it means.
#pragma once

#include "attention/attention_kernels.h"

namespace {

using kbit::AttentionArgs;
using kbit::CacheView;
using kbit::kPage;
using kbit::kSlots;

// n <= 16 values; whole vectors without a mask.
inline Floats load_some(const float* p, int n) { return n == 16 ? load(p) : load_first(p, n); }
inline void store_some(float* p, Floats a, int n) { return n == 16 ? store(p, a) : store_first(p, a, n); }

inline void copy_head(const float* x, int count, float* out) {
  for (int i = 0; i < count; i += 16) {
    const int n = count - i < 16 ? count - i : 16;
    store_some(out + i, load_some(x + i, n), n);
  }
}

inline void subtract_head(const float* x, const float* y, int count, float* out) {
  for (int i = 0; i < count; i += 16) {
    const int n = count - i < 16 ? count - i : 16;
    store_some(out + i, sub(load_some(x + i, n), load_some(y + i, n)), n);
  }
}

// Whether keys are stored less a constant: codes of what differs from token to token, and only of that.
inline bool without_bias(const AttentionArgs& a, const CacheView& c) { return a.key_bias && c.key_bits < 16; }

// x (D) turned by one token's angles, with the roundings of reference.rope.
void rotate_head(const float* x, const AttentionArgs& a, int64_t row, float* out) {
  const int half = a.rotated_half;
  const float* cos = a.cos + int64_t(a.rope_row[row]) * a.angle_stride;
  const float* sin = a.sin + int64_t(a.rope_row[row]) * a.angle_stride;
  for (int i = 0; i < half; i += 16) {
    const int n = half - i < 16 ? half - i : 16;
    const Floats first = load_some(x + i, n), second = load_some(x + half + i, n);
    const Floats c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(out + i, sub(mul(first, c), mul(second, s)), n);
    store_some(out + half + i, add(mul(second, c), mul(first, s)), n);
  }
  copy_head(x + 2 * half, a.head_dim - 2 * half, out + 2 * half);
}

// H[i][j] = -1 to the number of common bits of i and j.
struct HadamardMatrix {
  alignas(64) float at[16][16];
};
constexpr HadamardMatrix hadamard_matrix() {
  HadamardMatrix m{};
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      const int bits = i & j;
      m.at[i][j] = ((bits >> 3) ^ (bits >> 2) ^ (bits >> 1) ^ bits) & 1 ? -1.0f : 1.0f;
    }
  }
  return m;
}
constexpr HadamardMatrix kHadamard = hadamard_matrix();

// In every group (16 or 32) of x (D), the normalised Walsh-Hadamard transform in natural order; it is its own inverse.
// Quantization error then spreads over the group, and a channel that is always large no longer sets everyone's scale.
// Sixteen features are a product with the matrix, whose terms are added in ascending order (no shuffles, and the same
// roundings everywhere); a group of 32 is one butterfly more.
void hadamard(float* x, int head_dim, int group) {
  const Floats norm = broadcast(group == 32 ? 0.17677669529663687f : 0.25f);
  for (float* end = x + head_dim; x < end; x += group) {
    const int second = group - 16;  // offset of the group's second half, or 0
    Floats a = broadcast(x[0]), b = broadcast(x[second]);
    for (int i = 1; i < 16; ++i) {
      const Floats row = load(kHadamard.at[i]);
      a = fma(broadcast(x[i]), row, a);
      b = fma(broadcast(x[second + i]), row, b);
    }
    if (group == 16) {
      store(x, mul(a, norm));
    } else {
      store(x, mul(add(a, b), norm));
      store(x + 16, mul(sub(a, b), norm));
    }
  }
}

inline float largest_of(const float* x, int group) {
  Floats largest = abs(load(x));
  for (int i = 16; i < group; i += 16) largest = max(abs(load(x + i)), largest);
  return reduce_max(largest);
}

// The level of kKeptLevels that is nearest to n - 128, and its code; of two, the lower.
struct NearestLevels {
  alignas(64) float level[256];
  uint8_t code[256];
};
constexpr NearestLevels nearest_levels() {
  NearestLevels t{};
  for (int n = 0; n < 256; ++n) {
    int code = 0;
    while (code < 15 && 2 * (n - 128) > kbit::kKeptLevels[code] + kbit::kKeptLevels[code + 1]) ++code;
    t.level[n] = float(kbit::kKeptLevels[code]);
    t.code[n] = uint8_t(code);
  }
  return t;
}
constexpr NearestLevels kNearest = nearest_levels();

// What the value of largest magnitude is divided by, with both signs: reference.SHRINKS_4 by 111.43.
constexpr float kShrinks[4] = {1.0f, 0.93f, 0.86f, 0.79f};
constexpr float kLevelsPerLargest = 111.43f;

inline uint16_t half_scale(float exact) {
  return float_to_half(exact > 65504.0f ? 65504.0f : exact < -65504.0f ? -65504.0f : exact);
}

// x / scale, to the nearest whole number from -127 to 127, plus 128.
inline Ints level_index(const float* x, float scale) {
  const Floats level = div(load(x), broadcast(scale != 0.0f ? scale : 1.0f));
  return add(round_to_int(min(max(level, broadcast(-127.0f)), broadcast(127.0f))), broadcast(128));
}

// One group to 4 bits: of several scales, the first with the least squared error. A scale may be negative, as levels are
// not symmetric.
uint16_t quantize_group_4(const float* x, int group, uint8_t* codes) {
  Floats top = load(x), bottom = sub(zero(), top);
  for (int i = 16; i < group; i += 16) {
    top = max(load(x + i), top);
    bottom = max(sub(zero(), load(x + i)), bottom);
  }
  const float high = reduce_max(top), low = reduce_max(bottom);
  const float largest = high >= low ? high : -low;
  uint16_t best = 0;
  float least = 0.0f;
  for (int i = 0; i < 8; ++i) {
    const float shrink = kShrinks[i % 4] / kLevelsPerLargest;
    const uint16_t half = half_scale(largest * (i < 4 ? -shrink : shrink));
    const float scale = half_to_float(half);
    Floats sum = zero();
    for (int j = 0; j < group; j += 16) {
      const Floats value = mul(lookup<8>(kNearest.level, level_index(x + j, scale)), broadcast(scale));
      const Floats error = sub(value, load(x + j));
      sum = add(sum, mul(error, error));
    }
    const float error = reduce_add(sum);
    if (i > 0 && !(error < least)) continue;
    best = half;
    least = error;
  }
  const float scale = half_to_float(best);
  for (int j = 0; j < group; j += 16) {
    store_low_bytes(reinterpret_cast<int8_t*>(codes + j), level_index(x + j, scale));
    for (int i = j; i < j + 16; ++i) codes[i] = kNearest.code[codes[i]];
  }
  return best;
}

// One group: codes (one byte each; 8 bits: the int8 level) and the scale as half precision.
// Levels are kKeptLevels at 4 bits, 2 q + 1 - 2^bits at 3 and 2, -127 .. 127 at 8 bits, times the scale.
uint16_t quantize_group(const float* x, int group, int bits, uint8_t* codes) {
  if (bits == 4) return quantize_group_4(x, group, codes);
  const float steps = bits == 8 ? 127.0f : float(1 << bits);
  const float exact = largest_of(x, group) / steps;
  const uint16_t half = half_scale(exact);
  const float scale = half_to_float(half);
  const Floats divisor = broadcast(scale > 0.0f ? scale : 1.0f);  // a scale of zero makes every level zero
  const Floats top = broadcast(bits == 8 ? 127.0f : float((1 << bits) - 1));
  const Floats bottom = broadcast(bits == 8 ? -127.0f : 0.0f);
  for (int i = 0; i < group; i += 16) {
    Floats level = div(load(x + i), divisor);
    if (bits < 8) level = fma(level, broadcast(0.5f), mul(top, broadcast(0.5f)));
    store_low_bytes(reinterpret_cast<int8_t*>(codes + i), round_to_int(min(max(level, bottom), top)));
  }
  return half;
}

// Codes of one slot of keys: a plane of width w holds bits [low, low + w) of the codes.
void write_key_plane(uint8_t* plane, int slot, const uint8_t* codes, int head_dim, int width, int low) {
  const int fields = 8 / width, mask = (1 << width) - 1;
  for (int first = 0; first < head_dim; first += 4 * fields, plane += 64) {
    for (int j = 0; j < 4; ++j) {
      int byte = 0;
      for (int f = 0; f < fields; ++f) {
        const int feature = first + 4 * f + j;
        if (feature < head_dim) byte |= (codes[feature] >> low & mask) << (f * width);
      }
      plane[4 * slot + j] = uint8_t(byte);
    }
  }
}

// Codes of one slot of values: field `slot` of every lane of the words of each 16 features.
void write_value_plane(uint8_t* plane, int slot, const uint8_t* codes, int head_dim, int width, int low) {
  const int mask = (1 << width) - 1, bit = slot * width;
  const int64_t vector = 32 * width;  // bytes for 16 features x 16 slots
  for (int first = 0; first < head_dim; first += 16, plane += vector) {
    if (width == 1) {
      for (int i = 0; i < 16; ++i) {
        uint16_t word;
        memcpy(&word, plane + 2 * i, 2);
        word = uint16_t((word & ~(1 << bit)) | (codes[first + i] >> low & 1) << bit);
        memcpy(plane + 2 * i, &word, 2);
      }
    } else {
      uint8_t* words = plane + bit / 32 * 64;
      for (int i = 0; i < 16; ++i) {
        uint32_t word;
        memcpy(&word, words + 4 * i, 4);
        word = (word & ~(uint32_t(mask) << bit % 32)) | uint32_t(codes[first + i] >> low & mask) << bit % 32;
        memcpy(words + 4 * i, &word, 4);
      }
    }
  }
}

// Codes of a rotated head, and its scales into a block's scales (groups, 16).
void quantize_head(const CacheView& c, int bits, const float* x, uint8_t* codes, uint16_t* scales, int slot) {
  for (int g = 0; g < c.groups; ++g) {
    scales[g * kSlots + slot] = quantize_group(x + g * c.group, c.group, bits, codes + g * c.group);
  }
}

// x: (padded), what lies beyond D is zero; it is overwritten. codes: room for D bytes.
void write_key(const CacheView& c, uint8_t* block, int slot, float* x, uint8_t* codes) {
  const int dim = c.head_dim;
  if (c.key_bits == 32) {
    float* to = reinterpret_cast<float*>(block) + slot;
    for (int d = 0; d < dim; ++d) to[16 * d] = x[d];
  } else if (c.key_bits == 16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(block) + slot;
    for (int d = 0; d < dim; d += 16) {
      uint16_t halves[16];
      store_half(halves, load(x + d));
      for (int i = 0; i < 16 && d + i < dim; ++i) to[16 * (d + i)] = halves[i];
    }
  } else {
    hadamard(x, dim, c.group);
    quantize_head(c, c.key_bits, x, codes, reinterpret_cast<uint16_t*>(block + c.key_codes), slot);
    if (c.key_bits == 3) {
      write_key_plane(block, slot, codes, dim, 2, 0);
      write_key_plane(block + (dim + 15) / 16 * 64, slot, codes, dim, 1, 2);
    } else {
      write_key_plane(block, slot, codes, dim, c.key_bits, 0);
    }
  }
}

// As write_key.
void write_value(const CacheView& c, uint8_t* block, int slot, float* x, uint8_t* codes) {
  if (c.value_bits == 32) {
    copy_head(x, c.padded, reinterpret_cast<float*>(block) + int64_t(slot) * c.padded);
  } else if (c.value_bits == 16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(block) + int64_t(slot) * c.padded;
    for (int d = 0; d < c.padded; d += 16) store_half(to + d, load(x + d));
  } else {
    hadamard(x, c.head_dim, c.group);
    quantize_head(c, c.value_bits, x, codes, reinterpret_cast<uint16_t*>(block + c.value_codes), slot);
    if (c.value_bits == 8) {
      for (int d = 0; d < c.head_dim; ++d) codes[d] ^= 0x80;  // unsigned: a lane's field then needs no sign
    }
    if (c.value_bits == 3) {
      write_value_plane(block, slot, codes, c.head_dim, 2, 0);
      write_value_plane(block + c.head_dim * 4, slot, codes, c.head_dim, 1, 2);
    } else {
      write_value_plane(block, slot, codes, c.head_dim, c.value_bits, 0);
    }
  }
}

void append(const AttentionArgs& a, const CacheView& c, int64_t first_row, int64_t rows, int kv_head, float* scratch) {
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + c.padded);
  const int last = c.padded - 16;
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    uint8_t* keys = keys_at(a, c, a.sequence[row], a.position[row] / kPage, kv_head);
    uint8_t* values = values_of(c, keys);
    const int64_t block = a.position[row] % kPage / kSlots;
    const int slot = a.position[row] % kSlots;
    store(scratch + last, zero());
    const float* key = a.k + row * a.k_stride + int64_t(kv_head) * a.head_dim;
    if (without_bias(a, c)) {
      float* rest = scratch + 2 * c.padded;
      subtract_head(key, a.key_bias + int64_t(kv_head) * a.head_dim, a.head_dim, rest);
      key = rest;
    }
    rotate_head(key, a, row, scratch);
    write_key(c, keys + block * c.key_block, slot, scratch, codes);
    if (c.latent) continue;
    store(scratch + last, zero());
    copy_head(a.v + row * a.v_stride + int64_t(kv_head) * a.head_dim, a.head_dim, scratch);
    write_value(c, values + block * c.value_block, slot, scratch, codes);
  }
}

// The queries of a task as scores want them: (M, padded) floats, or int8 codes (M, padded bytes; `floats` is then room
// for one query) with, per group, the scale, what to add to twice the dot product with key codes (see score_tile), and
// where that dot product starts.
struct Queries {
  float* floats;
  int8_t* codes;
  float* scales;
  float* offsets;
  int32_t* starts;
  float* turns;  // (M, padded), see turn_bias
};

// What a constant b, turned as keys are, adds to the dot product of a turned query x and the key at position p:
//   sum over pairs of  cos(p f) (x1 b1 + x2 b2) + sin(p f) (x2 b1 - x1 b2)
// out takes the factors of the cosines, then those of the sines: (2 * rotated_half). Features that do not turn add the
// same to every score, which softmax does not see.
void turn_bias(const float* x, const float* b, int half, float* out) {
  for (int i = 0; i < half; i += 16) {
    const int n = half - i < 16 ? half - i : 16;
    const Floats x1 = load_some(x + i, n), x2 = load_some(x + half + i, n);
    const Floats b1 = load_some(b + i, n), b2 = load_some(b + half + i, n);
    store_some(out + i, add(mul(x1, b1), mul(x2, b2)), n);
    store_some(out + half + i, sub(mul(x2, b1), mul(x1, b2)), n);
  }
}

// Whether scores take levels, int8 plus kLevelBias, and not codes of equal steps.
inline bool keys_are_levels(const CacheView& c) { return c.key_bits == 8 || c.key_bits == 4; }

// One query to int8, by groups: absmax / 127.
void quantize_query(const CacheView& c, const float* x, const Queries& q, int64_t m) {
  for (int g = 0; g < c.groups; ++g, x += c.group) {
    const float largest = largest_of(x, c.group);
    const bool zeros = !(largest > 1e-36f);  // 127 / largest would overflow, or it is NaN; so stay its scale
    const Floats inverse = broadcast(zeros ? 0.0f : 127.0f / largest);
    Ints sum = broadcast(0);
    for (int i = 0; i < c.group; i += 16) {
      const Ints code = round_to_int(mul(load(x + i), inverse));
      store_low_bytes(q.codes + m * c.padded + g * c.group + i, code);
      sum = add(sum, code);
    }
    const float total = reduce_add(to_float(sum));  // exact: at most 32 * 127
    q.scales[m * c.groups + g] = largest / 127.0f;
    q.offsets[m * c.groups + g] = keys_are_levels(c) ? 0.0f : float(1 - (1 << c.key_bits)) * total;
    q.starts[m * c.groups + g] = keys_are_levels(c) ? -kLevelBias * int32_t(total) : 0;
  }
}

// Asks for `bytes` that will be read soon.
inline void prefetch_bytes(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(from) + i);
}

// Rotates and scales row's query `head` into place m. Scores are in units of log2, so that weights are powers of two.
void prepare_query(const AttentionArgs& a, const CacheView& c, int64_t row, int head, const Queries& q, int64_t m) {
  float* x = c.key_bits >= 16 ? q.floats + m * c.padded : q.floats;
  store(x + c.padded - 16, zero());
  rotate_head(a.q + row * a.q_stride + int64_t(head) * a.head_dim, a, row, x);
  const Floats factor = broadcast(a.scale * 1.44269504088896341f);
  for (int d = 0; d < c.padded; d += 16) store(x + d, mul(load(x + d), factor));
  if (c.key_bits < 16) {
    if (a.key_bias) {
      const float* bias = a.key_bias + int64_t(head / (a.heads / a.kv_heads)) * a.head_dim;
      turn_bias(x, bias, a.rotated_half, q.turns + m * c.padded);
    }
    hadamard(x, c.head_dim, c.group);
    quantize_query(c, x, q, m);
  }
}

}  // namespace
