// Trellis decoders: from a tile's bits (matrix.h) to the product whose bytes are summed, 16 rows at once, and on to int8
// digits or floats. A level is the sum of the bytes of a product, less what makes it zero on average
// (kbit/formats/trellis_code.py).
#pragma once

#include "codecs/matrix.h"
#include "simd/repeat.h"

namespace {

using kbit::Code;
using kbit::Matrix;

constexpr int kTrellisColumns = 16;

// What a code is made of.
template <Code kCode> struct Trellis;
template <> struct Trellis<Code::sum4> {
  static constexpr int32_t kZero = 510;     // the sum of bytes that is level 0
  static constexpr int kProducts = 16;      // vectors of products of a tile: one for each column
  static constexpr int kCopies = 4;         // bytes of a product that belong to one column
  static constexpr int kDigitShift = 2;     // level + kZero = high * 2^shift + low
  // Less 128 in each byte, as dot4 takes bytes: what the sum still lacks.
  static constexpr int32_t kRest = 4 * 128 - kZero;
};
template <> struct Trellis<Code::sum2> {
  static constexpr int32_t kZero = 255;
  static constexpr int kProducts = 8;       // vector i: columns i (high half of a lane) and 8 + i
  static constexpr int kCopies = 2;
  static constexpr int kDigitShift = 1;
  static constexpr int32_t kRest = 2 * 128 - kZero;
};

// The columns of x that meet the four bytes of a lane of vector I, within a tile.
template <Code kCode> constexpr int trellis_column(int i, int byte) {
  return kCode == Code::sum4 ? i : byte < 2 ? 8 + i : i;
}

// Calls body.template operator()<I>(bytes) with the products of a tile, vector by vector. `mask` keeps L bits.
//
// Lane r has row r's 8 Halves bits, the earliest the most significant: Halves / 2 for each column or, of an odd number of
// halves, one less and one more in turn. A window that reaches back over their beginning goes on in the last bits of the
// row before (of row 15, before row 0).
template <Code kCode, int Halves, typename Body>
__attribute__((always_inline)) inline void trellis_products(const uint8_t* tile, int32_t mask, Body&& body) {
  if constexpr (kCode == Code::sum2) {
    static_assert(Halves == 4);
    const Ints words = load_ints(reinterpret_cast<const int32_t*>(tile));  // lane: columns 0..7 | 8..15
    const Ints before = or_bits(shift_right<16>(words), shift_left<16>(previous_lane(words)));
    const Words now = as_words(words), then = as_words(before), keep = broadcast_word(uint16_t(mask));
    repeat<8>([&]<int I>() __attribute__((always_inline)) {
      const Words window = and_words(funnel<2 * (I + 1)>(then, now), keep);
      body.template operator()<I>(as_bytes(multiply(window, uint16_t(47157))));
    });
  } else {
    constexpr int kPairs32 = Halves / 4, kWords = Halves / 2;
    constexpr bool kOdd = kWords % 2 != 0, kByte = Halves % 2 != 0;
    Ints pair[kPairs32], last = broadcast(0);
    for (int p = 0; p < kPairs32; ++p) pair[p] = load_ints(reinterpret_cast<const int32_t*>(tile + 64 * p));
    if constexpr (kOdd) last = load_u16(reinterpret_cast<const uint16_t*>(tile + 64 * kPairs32));
    Ints end = kOdd ? last : pair[kPairs32 - 1];  // the row's last bits: of whole words 16 at least, else 32
    if constexpr (kByte) {
      const Ints byte = load_u8(tile + 16 * (Halves - 1)), before = shift_left<kOdd ? 24 : 8>(pair[kPairs32 - 1]);
      end = or_bits(kOdd ? or_bits(before, shift_left<8>(last)) : before, byte);
    }
    // Words 2 p - 1 and 2 p, side by side; the first: the last of the row before.
    Ints across[kPairs32 + 1];
    across[0] = or_bits(shift_left<16>(previous_lane(end)), shift_right<16>(pair[0]));
    for (int p = 1; p < kPairs32; ++p) across[p] = or_bits(shift_left<16>(pair[p - 1]), shift_right<16>(pair[p]));
    across[kPairs32] = or_bits(shift_left<16>(pair[kPairs32 - 1]), last);
    repeat<16>([&]<int I>() __attribute__((always_inline)) {
      constexpr int kEnd = (I + 1) * (Halves / 2) + (kByte ? (I + 1) / 2 : 0), kWord = (kEnd - 1) / 16;
      constexpr int kShift = kWord < kWords ? 16 * (kWord + 1) - kEnd : 8 * Halves - kEnd;
      const Ints bits = kWord >= kWords ? end : kWord % 2 ? pair[kWord / 2] : across[kWord / 2];
      const Ints window = and_bits(shift_right<kShift>(bits), mask);
      body.template operator()<I>(as_bytes(multiply(window, int32_t(0x83DCD12Du))));
    });
  }
}

// Bytes as dot4 takes them: less 128, plus its bias.
inline __attribute__((always_inline)) Bytes signed_bytes(Bytes products) {
  if constexpr (kLevelBias == 128) return products;
  return xor_bits(products, 0x80);
}

// A product's byte sums, lane by lane: of column I; with sum2 of columns I (kHigh) or 8 + I.
template <Code kCode> inline __attribute__((always_inline)) Ints byte_sum(Bytes products, bool high) {
  const Ints x = as_ints(products);
  const Ints pairs = add(and_bits(x, 0x00ff00ff), and_bits(shift_right<8>(x), 0x00ff00ff));
  if constexpr (kCode == Code::sum4) return add(and_bits(pairs, 0xffff), shift_right<16>(pairs));
  return high ? shift_right<16>(pairs) : and_bits(pairs, 0xffff);
}

// The byte sums of a tile: (16 columns, 16 rows) int32.
template <Code kCode, int Halves> inline void trellis_sums(const uint8_t* tile, int32_t mask, int32_t* sums) {
  trellis_products<kCode, Halves>(tile, mask, [&]<int I>(Bytes products) __attribute__((always_inline)) {
    if constexpr (kCode == Code::sum4) {
      store_ints(sums + 16 * I, byte_sum<kCode>(products, false));
    } else {
      store_ints(sums + 16 * I, byte_sum<kCode>(products, true));
      store_ints(sums + 16 * (8 + I), byte_sum<kCode>(products, false));
    }
  });
}

// Calls function.template operator()<code, twice the bits>() for a matrix's.
template <typename Function> inline void with_trellis(const Matrix& w, Function&& function) {
  if (w.code == Code::sum2) return function.template operator()<Code::sum2, 4>();
  switch (2 * w.bits + w.half) {
    case 4: return function.template operator()<Code::sum4, 4>();
    case 5: return function.template operator()<Code::sum4, 5>();
    case 6: return function.template operator()<Code::sum4, 6>();
    case 7: return function.template operator()<Code::sum4, 7>();
    case 8: return function.template operator()<Code::sum4, 8>();
    case 9: return function.template operator()<Code::sum4, 9>();
    case 10: return function.template operator()<Code::sum4, 10>();
    case 11: return function.template operator()<Code::sum4, 11>();
    case 12: return function.template operator()<Code::sum4, 12>();
  }
}

inline float trellis_step(Code code) { return code == Code::sum4 ? 0.00677f : 0.00957f; }

// Weights of tiles of 64 columns as floats, [column][16 rows], rotated: level * (step * scale).
void expand_trellis_floats(const Matrix& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  with_trellis(w, [&]<Code kCode, int Halves>() {
    const uint8_t* tile = w.codes + panel * w.panel_bytes() + begin * w.tile_bytes();
    const Floats scale = mul(broadcast(trellis_step(kCode)),
                             load_half(static_cast<const uint16_t*>(w.scales) + panel * kbit::kPanelRows));
    alignas(64) int32_t sums[16 * kTrellisColumns];
    for (int64_t t = 4 * begin; t < 4 * end; ++t, tile += 16 * Halves) {
      trellis_sums<kCode, Halves>(tile, w.window_mask, sums);
      for (int c = 0; c < kTrellisColumns; ++c, out += 16) {
        store(out, mul(to_float(add(load_ints(sums + 16 * c), broadcast(-Trellis<kCode>::kZero))), scale));
      }
    }
  });
}

}  // namespace
