// The kernel behind trellis.h, over the vector interface: a lane is an overlap of two windows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rounding/trellis.h"
#include "simd/repeat.h"

namespace {

using kbit::TrellisTask;

// One number: the least cost of every overlap m after it, over the 2^Bits windows that end in m.
//
//   window j m (j its earliest Bits bits) comes from overlap (j m) >> Bits
//
// `base` is taken off all costs; returns the least of what is left.
template <int Bits>
uint16_t trellis_step(const uint16_t* values, int window, uint16_t number, uint16_t base, const uint16_t* before,
                      uint16_t* after, uint8_t* choices) {
  constexpr int kChoices = 1 << Bits, kDoublings = kbit::trellis_doublings(Bits);
  const int64_t overlaps = int64_t(1) << (window - Bits), from = overlaps >> Bits;
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
    if constexpr (Bits <= 3) {
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

template <int Bits> struct TrellisPath {
  const TrellisTask& t;
  int64_t overlaps;
  uint16_t *before, *after;
  uint8_t* choices;

  explicit TrellisPath(const TrellisTask& task) : t(task), overlaps(int64_t(1) << (task.code->window - Bits)) {
    before = reinterpret_cast<uint16_t*>(t.scratch);
    after = before + overlaps + 32;
    choices = reinterpret_cast<uint8_t*>(after + overlaps + 32);
  }

  // The costs after numbers [begin, begin + count), which go round the ring.
  void run(int begin, int count) {
    uint16_t base = 0;
    for (int i = 0; i < count; ++i) {
      float number = t.numbers[(begin + i) % kbit::kTrellisTile] * kbit::kTrellisUnit;
      number = number > -32767.0f ? number : -32767.0f;  // NaN too
      number = number < 32767.0f ? number : 32767.0f;
      const uint16_t wanted = uint16_t(int16_t(rintf(number)));
      base = trellis_step<Bits>(t.code->values.data(), t.code->window, wanted, base, before, after,
                                choices + i * overlaps);
      uint16_t* const swap = before;
      before = after, after = swap;
    }
  }

  // Back from an overlap after the last of `count` numbers to the one before number `down_to`, telling of every window.
  template <typename Told> int64_t back(int64_t overlap, int count, int down_to, Told&& told) const {
    for (int i = count - 1; i >= down_to; --i) {
      const int64_t window = (int64_t(choices[i * overlaps + overlap]) << (t.code->window - Bits)) | overlap;
      told(i, window);
      overlap = window >> Bits;
    }
    return overlap;
  }
};

template <int Bits> void trellis_tile(const TrellisTask& t) {
  constexpr int kTile = kbit::kTrellisTile, kSeam = kbit::trellis_seam(Bits);
  TrellisPath<Bits> path(t);
  memset(path.before, 0, size_t(2 * path.overlaps));
  path.run(kTile - kSeam, 2 * kSeam);
  int64_t end = 0;
  for (int64_t m = 1; m < path.overlaps; ++m) end = path.before[m] < path.before[end] ? m : end;
  const int64_t seam = path.back(end, 2 * kSeam, kSeam, [](int, int64_t) {});
  memset(path.before, 0xff, size_t(2 * path.overlaps));
  path.before[seam] = 0;
  path.run(0, kTile);
  memset(t.string, 0, 32 * Bits);
  path.back(seam, kTile, 0, [&](int i, int64_t window) {
    for (int b = 0; b < Bits; ++b) {
      const int place = i * Bits + b;
      t.string[place / 8] |= uint8_t((window >> (Bits - 1 - b) & 1) << (7 - place % 8));
    }
  });
}

void trellis_search(const TrellisTask& t) {
  switch (t.code->bits) {
    case 2: return trellis_tile<2>(t);
    case 3: return trellis_tile<3>(t);
    case 4: return trellis_tile<4>(t);
    case 5: return trellis_tile<5>(t);
    case 6: return trellis_tile<6>(t);
  }
}

}  // namespace
