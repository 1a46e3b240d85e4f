// Weighted sums of values: 16 features to a vector, slots added one after another in ascending order, each row over
// exactly the slots it sees.
#pragma once

#include "attention/attention_scores.h"
#include "simd/transpose.h"

namespace {

// A chunk's values, the weights of some rows, and where the sums go. Features share weights by groups: for codes these
// include the scales; floats have one group.
struct ValueTile {
  const void* values[kChunkPages];  // slot 0 of each page: floats or halves (slots, padded), or blocks of codes
  int64_t value_block;    // bytes, for codes
  int padded, group, groups;
  const float* weights;   // (R, groups, kChunk)
  const int* begin;       // (R), slots of the chunk that a row sees
  const int* end;
  float* out;             // (R, out_stride)
  int64_t out_stride;
  const float* keep;      // (R): out = keep * out + add * sum; null: out = sum
  const float* add;
  const uint8_t* next[kChunkPages];  // block 0 of the keys of each page of the chunk after this one
  int64_t next_block;     // bytes
};

// Sums of R rows and F = G * P vectors of 16 features: G groups, P vectors of each.
template <int R, int F> struct Sums {
  Floats at[R][F];
};

template <int R, int F> inline void clear(Sums<R, F>& sums) {
  for (int r = 0; r < R; ++r)
    for (int f = 0; f < F; ++f) sums.at[r][f] = zero();
}

// sum += weight of `slot` * value, for all rows. weights (R): of the first group.
template <int R, int G, int P>
inline __attribute__((always_inline)) void add_slot(Sums<R, G * P>& sums, const float* const (&weights)[R], int slot,
                                                    const Floats (&value)[G * P]) {
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) {
      const Floats weight = broadcast(weights[r][g * kChunk + slot]);
      for (int p = 0; p < P; ++p) sums.at[r][g * P + p] = fma(weight, value[g * P + p], sums.at[r][g * P + p]);
    }
  }
}

template <int R, int F> inline void finish(const ValueTile& t, int vector, const Sums<R, F>& sums) {
  for (int r = 0; r < R; ++r) {
    if (t.begin[r] >= t.end[r]) continue;
    for (int f = 0; f < F; ++f) {
      float* out = t.out + r * t.out_stride + 16 * (vector + f);
      const Floats sum = sums.at[r][f];
      store(out, t.keep ? fma(load(out), broadcast(t.keep[r]), mul(sum, broadcast(t.add[r]))) : sum);
    }
  }
}

// Floats, halves, or levels as floats; vectors [vector, vector + G * P), which begin a group.
template <class Element, int R, int G, int P> void weigh_rows(const ValueTile& t, int vector) {
  constexpr int F = G * P;
  Sums<R, F> sums;
  clear(sums);
  // body(where its values are, slot) for slots [begin, end) of the chunk
  const auto each_slot = [&](int begin, int end, auto body) __attribute__((always_inline)) {
    for (int page = begin / kPage; page * kPage < end; ++page) {
      const Element* values = static_cast<const Element*>(t.values[page]) + 16 * vector;
      const int stop = end < (page + 1) * kPage ? end : (page + 1) * kPage;
      for (int slot = begin > page * kPage ? begin : page * kPage; slot < stop; ++slot) {
        body(values + int64_t(slot - page * kPage) * t.padded, slot);
      }
    }
  };
  const float* weights[R];
  for (int r = 0; r < R; ++r) weights[r] = t.weights + (int64_t(r) * t.groups + 16 * vector / t.group) * kChunk;
  const auto one_row = [&](auto row, int begin, int end) __attribute__((always_inline)) {
    constexpr int r = decltype(row)::value;
    each_slot(begin, end, [&](const Element* values, int slot) __attribute__((always_inline)) {
      for (int f = 0; f < F; ++f) {
        const Floats value = load_element(values + 16 * f);
        sums.at[r][f] = fma(broadcast(weights[r][f / P * kChunk + slot]), value, sums.at[r][f]);
      }
    });
  };
  int begin = t.begin[0], end = t.end[0];  // what all rows see
  for (int r = 1; r < R; ++r) {
    begin = t.begin[r] > begin ? t.begin[r] : begin;
    end = t.end[r] < end ? t.end[r] : end;
  }
  if (begin >= end) begin = end = kChunk;  // nothing in common: row by row
  repeat<R>([&]<int I>() __attribute__((always_inline)) {
    one_row(Index<I>{}, t.begin[I], t.end[I] < begin ? t.end[I] : begin);
  });
  each_slot(begin, end, [&](const Element* values, int slot) __attribute__((always_inline)) {
    Floats value[F];
    for (int f = 0; f < F; ++f) value[f] = load_element(values + 16 * f);
    add_slot<R, G, P>(sums, weights, slot, value);
  });
  repeat<R>([&]<int I>() __attribute__((always_inline)) { one_row(Index<I>{}, end, t.end[I]); });
  finish(t, vector, sums);
}

// ------------------------------------------------------------------------------------------------------- codes

// The levels of codes, as floats: kKeptLevels, or 2 q + 1 - 2^bits.
alignas(64) constexpr float kLevels4[16] = {-127, -100, -79, -62, -48, -34, -22, -9, 3, 15, 28, 42, 56, 73, 93, 122};
alignas(64) constexpr float kLevels3[8] = {-7, -5, -3, -1, 1, 3, 5, 7};
alignas(64) constexpr float kLevels2[4] = {-3, -1, 1, 3};

// A word holds the codes of several consecutive slots of 16 features, one feature to a lane.
template <int Bits> struct Word {
  static constexpr int kSlotsPer = Bits == 8 ? 4 : Bits == 4 ? 8 : 16;
  Ints low, top;  // top: the third bit

  // Word number `index` of 16 features; `block` begins with the planes of the whole head.
  static inline Word read(const uint8_t* block, int padded, int vector, int index) {
    Word w;
    if constexpr (Bits == 3) {
      w.low = load_ints(reinterpret_cast<const int32_t*>(block + 64 * vector));
      w.top = load_u16(reinterpret_cast<const uint16_t*>(block + 4 * padded + 32 * vector));
    } else {
      w.low = w.top = load_ints(reinterpret_cast<const int32_t*>(block + 32 * Bits * vector + 64 * index));
    }
    return w;
  }

  template <int Field> inline Floats level() const {
    if constexpr (Bits == 8) return sub(to_float(and_bits(shift_right<8 * Field>(low), 255)), broadcast(128.0f));
    if constexpr (Bits == 4) return lookup<4>(kLevels4, and_bits(shift_right<4 * Field>(low), 15));
    if constexpr (Bits == 2) return lookup<2>(kLevels2, and_bits(shift_right<2 * Field>(low), 3));
    if constexpr (Bits == 3) {
      const Ints two = and_bits(shift_right<2 * Field>(low), 3);
      if constexpr (Field < 2) return lookup<3>(kLevels3, or_bits(two, and_bits(shift_left<2 - Field>(top), 4)));
      else return lookup<3>(kLevels3, or_bits(two, and_bits(shift_right<Field - 2>(top), 4)));
    }
  }
};

// As weigh_rows, straight from the codes: for the rows of one token, which see the same slots, and groups of 32.
template <int Bits, int R, int G> void weigh_codes(const ValueTile& t, int vector) {
  constexpr int F = 2 * G, kPer = Word<Bits>::kSlotsPer;
  Sums<R, F> sums;
  clear(sums);
  const int begin = t.begin[0], end = t.end[0];
  for (int first = begin / kPer * kPer; first < end; first += kPer) {
    const int page = first / kPage, within = first % kPage / kSlots;
    const uint8_t* block = static_cast<const uint8_t*>(t.values[page]) + within * t.value_block;
    if (vector == 0 && first % kSlots == 0) prefetch_bytes(t.next[page] + within * t.next_block, t.next_block);
    const float* weights[R];  // from slot `first` on
    for (int r = 0; r < R; ++r) weights[r] = t.weights + (int64_t(r) * t.groups + vector / 2) * kChunk + first;
    Word<Bits> word[F];
    for (int f = 0; f < F; ++f) word[f] = Word<Bits>::read(block, t.padded, vector + f, first % kSlots / kPer);
    if (first >= begin && first + kPer <= end) {
      repeat<kPer>([&]<int I>() __attribute__((always_inline)) {
        Floats value[F];
        for (int f = 0; f < F; ++f) value[f] = word[f].template level<I>();
        add_slot<R, G, 2>(sums, weights, I, value);
      });
    } else {
      Floats values[kPer][F];
      repeat<kPer>([&]<int I>() __attribute__((always_inline)) {
        for (int f = 0; f < F; ++f) values[I][f] = word[f].template level<I>();
      });
      const int last = end - first < kPer ? end - first : kPer;
      for (int i = first < begin ? begin - first : 0; i < last; ++i) add_slot<R, G, 2>(sums, weights, i, values[i]);
    }
  }
  finish(t, vector, sums);
}

// All features, in tiles as wide as they go. G groups of P vectors to a tile.
template <class Element, int R, int F> inline void weigh_floats(const ValueTile& t, int vector) {
  for (; vector + F <= t.padded / 16; vector += F) weigh_rows<Element, R, 1, F>(t, vector);
  if constexpr (F > 1) {
    if (vector < t.padded / 16) weigh_floats<Element, R, F / 2>(t, vector);
  }
}
template <int R, int G, int P> inline void weigh_levels(const ValueTile& t, int vector) {
  for (; vector + G * P <= t.padded / 16; vector += G * P) weigh_rows<float, R, G, P>(t, vector);
  if constexpr (G > 1) {
    if (vector < t.padded / 16) weigh_levels<R, G / 2, P>(t, vector);
  }
}
template <int Bits, int R, int G> inline void weigh_codes_of(const ValueTile& t, int vector) {
  for (; vector + 2 * G <= t.padded / 16; vector += 2 * G) weigh_codes<Bits, R, G>(t, vector);
  if constexpr (G > 1) {
    if (vector < t.padded / 16) weigh_codes_of<Bits, R, G / 2>(t, vector);
  }
}

// direct: `values` lie in the cache's form (one token's rows); else they were unpacked to floats or levels.
template <int R> void weigh(const ValueTile& t, int bits, bool direct) {
  constexpr int F = tile_width(R), G = F >= 4 ? 2 : 1;
  if (bits == 32 || (bits == 16 && !direct)) return weigh_floats<float, R, F>(t, 0);
  if (bits == 16) return weigh_floats<uint16_t, R, F>(t, 0);
  if (!direct) return t.group == 32 ? weigh_levels<R, G, 2>(t, 0) : weigh_levels<R, 2 * G, 1>(t, 0);
  switch (bits) {
    case 8: return weigh_codes_of<8, R, G>(t, 0);
    case 4: return weigh_codes_of<4, R, G>(t, 0);
    case 3: return weigh_codes_of<3, R, G>(t, 0);
    default: return weigh_codes_of<2, R, G>(t, 0);
  }
}

// -------------------------------------------------------------------------------------------------- unpacking

template <int Bits> void unpack_value_block(const uint8_t* block, int padded, float* out) {
  constexpr int kPer = Word<Bits>::kSlotsPer;
  for (int vector = 0; vector < padded / 16; ++vector) {
    for (int index = 0; index < kSlots / kPer; ++index) {
      const Word<Bits> word = Word<Bits>::read(block, padded, vector, index);
      repeat<kPer>([&]<int I>() __attribute__((always_inline)) {
        store(out + int64_t(index * kPer + I) * padded + 16 * vector, word.template level<I>());
      });
    }
  }
}

// Blocks [begin, end) of a page's values to floats, or to the levels of codes: (slots, padded).
void unpack_values(const CacheView& c, const uint8_t* values, int64_t begin, int64_t end, float* out) {
  for (int64_t b = begin; b < end; ++b, out += kSlots * c.padded) {
    const uint8_t* block = values + b * c.value_block;
    if (c.value_bits == 16) {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(block);
      for (int i = 0; i < kSlots * c.padded; i += 16) store(out + i, load_half(halves + i));
    } else if (c.value_bits == 8) {
      unpack_value_block<8>(block, c.padded, out);
    } else if (c.value_bits == 4) {
      unpack_value_block<4>(block, c.padded, out);
    } else if (c.value_bits == 3) {
      unpack_value_block<3>(block, c.padded, out);
    } else {
      unpack_value_block<2>(block, c.padded, out);
    }
  }
}

// The same of keys that are values, too: blocks [begin, end) of a page, which lie as scores want them from `keys` on,
// `stride` bytes apart: floats (D, 16), or bytes (quads, 16, 4) that hold levels, plus kLevelBias, or codes of equal steps.
void unpack_latents(const CacheView& c, const uint8_t* keys, int64_t stride, int64_t begin, int64_t end, float* out) {
  const int dim = c.head_dim;
  for (int64_t b = begin; b < end; ++b, out += kSlots * c.padded) {
    const uint8_t* block = keys + b * stride;
    if (c.key_bits >= 16) {
      const float* from = reinterpret_cast<const float*>(block);
      int d = 0;
      for (; d + 16 <= dim; d += 16) transpose_16(from + d * kSlots, out + d, c.padded);
      for (; d < dim; ++d) {
        for (int slot = 0; slot < kSlots; ++slot) out[int64_t(slot) * c.padded + d] = from[d * kSlots + slot];
      }
      continue;
    }
    const bool levels = c.key_bits == 8 || c.key_bits == 4;
    const Floats unit = broadcast(levels ? 1.0f : 2.0f);
    const Floats offset = broadcast(levels ? float(-kLevelBias) : float(1 - (1 << c.key_bits)));
    const bool is_signed = levels && kLevelBias == 0;
    for (int d = 0; d < dim; d += 16) {
      for (int slot = 0; slot < kSlots; ++slot) {
        alignas(16) uint8_t bytes[16];
        for (int quad = 0; quad < 4; ++quad) memcpy(bytes + 4 * quad, block + 16 * (d + 4 * quad) + 4 * slot, 4);
        const Ints code = is_signed ? load_i8(reinterpret_cast<const int8_t*>(bytes)) : load_u8(bytes);
        store(out + int64_t(slot) * c.padded + d, fma(to_float(code), unit, offset));
      }
    }
  }
}

}  // namespace
