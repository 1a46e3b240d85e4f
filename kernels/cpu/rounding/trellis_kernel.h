// The kernel behind trellis.h, over the vector interface: a lane is an overlap of two windows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rounding/trellis.h"
#include "simd/repeat.h"

namespace {

using kbit::TrellisTask;

// One number, which brings Bits bits, before one that brings Next: the least cost of every overlap m after it, over the
// 2^Next windows that end in m.
//
//   window j m (j its earliest Next bits) comes from overlap (j m) >> Bits
//
// `base` is taken off all costs; returns the least of what is left.
template <int Bits, int Next, int kDoublings>
uint16_t trellis_step(const uint16_t* values, int window, uint16_t number, uint16_t base, const uint16_t* before,
                      uint16_t* after, uint8_t* choices) {
  constexpr int kChoices = 1 << Next;
  const int64_t overlaps = int64_t(1) << (window - Next), from = overlaps >> Bits;
  const Words wanted = broadcast_word(number), off = broadcast_word(base);
  Words all = broadcast_word(0xffff);
  for (int64_t m = 0; m < overlaps; m += 32) {
    Least least;
    const auto cost = [&](int j) __attribute__((always_inline)) {
      Words d = distance(load_words(values + j * overlaps + m), wanted);
      repeat<kDoublings>([&]<int>() __attribute__((always_inline)) { d = add_saturated(d, d); });
      return add_saturated(spread<Bits>(before + j * from + (m >> Bits)), high_square(d));
    };
    least.value = cost(0);
    least.which = broadcast_word(0);
    if constexpr (Next <= 3) {
      repeat<kChoices - 1>([&]<int J>() __attribute__((always_inline)) { keep_less(least, cost(J + 1), J + 1); });
    } else {
      for (int j = 1; j < kChoices; ++j) keep_less(least, cost(j), j);
    }
    least.value = sub_saturated(least.value, off);
    store_words(after + m, least.value);
    store_low_bytes(choices + m, least.which);
    all = min(all, least.value);
  }
  return reduce_min(all);
}

// Of Bits bits a number or, with half a bit more, of one more for every second (odd) number.
template <int Bits, bool kHalf> struct TrellisPath {
  static constexpr int kDoublings = kbit::trellis_doublings(Bits);
  const TrellisTask& t;
  int64_t overlaps;  // after an odd number; after even ones there are half as many where these bring more bits
  uint16_t *before, *after;
  uint8_t* choices;

  explicit TrellisPath(const TrellisTask& task) : t(task), overlaps(int64_t(1) << (task.code->window - Bits)) {
    before = reinterpret_cast<uint16_t*>(t.scratch);
    after = before + overlaps + 32;
    choices = reinterpret_cast<uint8_t*>(after + overlaps + 32);
  }

  // The costs after numbers [begin, begin + count), which go round the ring; begin is even.
  void run(int begin, int count) {
    uint16_t base = 0;
    const auto step = [&]<int In, int Next>(uint16_t wanted, uint8_t* chosen) __attribute__((always_inline)) {
      base = trellis_step<In, Next, kDoublings>(t.code->values.data(), t.code->window, wanted, base, before, after, chosen);
    };
    for (int i = 0; i < count; ++i) {
      float number = t.numbers[(begin + i) % kbit::kTrellisTile] * kbit::kTrellisUnit;
      number = number > -32767.0f ? number : -32767.0f;  // NaN too
      number = number < 32767.0f ? number : 32767.0f;
      const uint16_t wanted = uint16_t(int16_t(rintf(number)));
      if (!kHalf) step.template operator()<Bits, Bits>(wanted, choices + i * overlaps);
      else if (i % 2 == 0) step.template operator()<Bits, Bits + kHalf>(wanted, choices + i * overlaps);
      else step.template operator()<Bits + kHalf, Bits>(wanted, choices + i * overlaps);
      uint16_t* const swap = before;
      before = after, after = swap;
    }
  }

  // Back from an overlap after the last of `count` numbers to the one before number `down_to`, telling of every window.
  template <typename Told> int64_t back(int64_t overlap, int count, int down_to, Told&& told) const {
    for (int i = count - 1; i >= down_to; --i) {
      const int odd = kHalf && i % 2, even = kHalf && !odd;
      const int64_t window = (int64_t(choices[i * overlaps + overlap]) << (t.code->window - Bits - even)) | overlap;
      told(i, window);
      overlap = window >> (Bits + odd);
    }
    return overlap;
  }
};

template <int Bits, bool kHalf> void trellis_tile(const TrellisTask& t) {
  constexpr int kTile = kbit::kTrellisTile, kSeam = kbit::trellis_seam(Bits);
  static_assert(kSeam % 2 == 0);
  TrellisPath<Bits, kHalf> path(t);
  memset(path.before, 0, size_t(2 * path.overlaps));
  path.run(kTile - kSeam, 2 * kSeam);
  int64_t end = 0;
  for (int64_t m = 1; m < path.overlaps; ++m) end = path.before[m] < path.before[end] ? m : end;
  const int64_t seam = path.back(end, 2 * kSeam, kSeam, [](int, int64_t) {});
  memset(path.before, 0xff, size_t(2 * path.overlaps));
  path.before[seam] = 0;
  path.run(0, kTile);
  memset(t.string, 0, size_t(kbit::trellis_bytes(Bits, kHalf)));
  path.back(seam, kTile, 0, [&](int i, int64_t window) {
    const int count = Bits + (kHalf && i % 2), begin = i * Bits + (kHalf ? i / 2 : 0);
    for (int b = 0; b < count; ++b) {
      const int place = begin + b;
      t.string[place / 8] |= uint8_t((window >> (count - 1 - b) & 1) << (7 - place % 8));
    }
  });
}

void trellis_search(const TrellisTask& t) {
  switch (2 * t.code->bits + t.code->half) {
    case 4: return trellis_tile<2, false>(t);
    case 5: return trellis_tile<2, true>(t);
    case 6: return trellis_tile<3, false>(t);
    case 7: return trellis_tile<3, true>(t);
    case 8: return trellis_tile<4, false>(t);
    case 9: return trellis_tile<4, true>(t);
    case 10: return trellis_tile<5, false>(t);
    case 11: return trellis_tile<5, true>(t);
    case 12: return trellis_tile<6, false>(t);
  }
}

}  // namespace
