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

// What numbers hear of the errors of earlier ones of their row, for every overlap: 16 columns of it, `row` apart.
struct TrellisHeard {
  const uint16_t* before;    // of the overlaps before a number; null: it hears of none
  uint16_t* after;           // of those after it
  int64_t row;
  const int16_t* factors;    // of this number's error, for each column
  int column;                // of this number
};

// `trellis_step` where every overlap before the number has a number of its own, and hands its error on.
template <int Bits, int Next, int kDoublings>
uint16_t trellis_step_heard(const uint16_t* values, int window, const uint16_t* wanted, uint16_t base,
                            const uint16_t* before, uint16_t* after, uint8_t* choices, const TrellisHeard& heard) {
  constexpr int kChoices = 1 << Next;
  const int64_t overlaps = int64_t(1) << (window - Next), from = overlaps >> Bits;
  const Words off = broadcast_word(base);
  Words all = broadcast_word(0xffff);
  for (int64_t m = 0; m < overlaps; m += 32) {
    LeastWith least;
    const auto look = [&](int j, bool first) __attribute__((always_inline)) {
      const int64_t source = j * from + (m >> Bits);
      const Words error = sub_signed(spread<Bits>(wanted + source), load_words(values + j * overlaps + m));
      Words d = magnitude(error);
      repeat<kDoublings>([&]<int>() __attribute__((always_inline)) { d = add_saturated(d, d); });
      const Words cost = add_saturated(spread<Bits>(before + source), high_square(d));
      if (first) least = {cost, broadcast_word(0), error};
      else keep_less(least, cost, j, error);
    };
    look(0, true);
    if constexpr (Next <= 3) {
      repeat<kChoices - 1>([&]<int J>() __attribute__((always_inline)) { look(J + 1, false); });
    } else {
      for (int j = 1; j < kChoices; ++j) look(j, false);
    }
    least.value = sub_saturated(least.value, off);
    store_words(after + m, least.value);
    store_low_bytes(choices + m, least.which);
    all = min(all, least.value);
    for (int column = heard.column + 1; column < 16; ++column) {
      Words told = multiply_rounded(least.with, broadcast_word(uint16_t(heard.factors[column])));
      if (heard.before) {
        const uint16_t* const earlier = heard.before + column * heard.row + (m >> Bits);
        told = add_signed(pick<Bits, kChoices>(earlier, from, least.which), told);
      }
      store_words(heard.after + column * heard.row + m, told);
    }
  }
  return reduce_min(all);
}

inline int16_t trellis_number(float number) {
  number *= kbit::kTrellisUnit;
  number = number > -32767.0f ? number : -32767.0f;  // NaN too
  number = number < 32767.0f ? number : 32767.0f;
  return int16_t(rintf(number));
}

// Of Bits bits a number or, with half a bit more, of one more for every second (odd) number.
template <int Bits, bool kHalf> struct TrellisPath {
  static constexpr int kDoublings = kbit::trellis_doublings(Bits);
  const TrellisTask& t;
  int64_t overlaps;  // after an odd number; after even ones there are half as many where these bring more bits
  uint16_t *before, *after;
  uint16_t *wanted = nullptr, *heard_before = nullptr, *heard_after = nullptr;  // with feedback
  uint8_t* choices;

  explicit TrellisPath(const TrellisTask& task) : t(task), overlaps(int64_t(1) << (task.code->window - Bits)) {
    const int64_t row = kbit::trellis_row(*t.code);
    before = reinterpret_cast<uint16_t*>(t.scratch);
    after = before + row;
    uint16_t* end = after + row;
    if (t.feedback.columns) {
      wanted = end, heard_before = wanted + row, heard_after = heard_before + 16 * row;
      end = heard_after + 16 * row;
    }
    choices = reinterpret_cast<uint8_t*>(end);
  }

  // Calls step.template operator()<In, Next>() with the bits of number i and of the one after it.
  template <typename Step> __attribute__((always_inline)) static void with_bits(int i, Step&& step) {
    if (!kHalf) step.template operator()<Bits, Bits>();
    else if (i % 2 == 0) step.template operator()<Bits, Bits + kHalf>();
    else step.template operator()<Bits + kHalf, Bits>();
  }

  static void exchange(uint16_t*& a, uint16_t*& b) {
    uint16_t* const held = a;
    a = b, b = held;
  }

  // The costs after numbers [begin, begin + count), which go round the ring; begin is even.
  void run(int begin, int count) {
    uint16_t base = 0;
    for (int i = 0; i < count; ++i) {
      const uint16_t number = uint16_t(trellis_number(t.numbers[(begin + i) % kbit::kTrellisTile]));
      with_bits(i, [&]<int In, int Next>() __attribute__((always_inline)) {
        base = trellis_step<In, Next, kDoublings>(t.code->values.data(), t.code->window, number, base, before, after,
                                                  choices + i * overlaps);
      });
      exchange(before, after);
    }
  }

  // The same with errors passed on along rows; and to later rows, where it begins with the first.
  void run_heard(int begin, int count) {
    uint16_t base = 0;
    const int64_t row = kbit::trellis_row(*t.code);
    int16_t numbers[kbit::kTrellisTile];
    int32_t windows[kbit::kTrellisTile], errors[kbit::kTrellisTile];
    for (int i = 0; i < kbit::kTrellisTile; ++i) numbers[i] = trellis_number(t.numbers[i]);
    for (int i = 0; i < count; ++i) {
      const int at = (begin + i) % kbit::kTrellisTile, column = at % 16;
      if (begin == 0 && column == 0 && at > 0) hear_rows(at, base, numbers, windows, errors);
      const bool alone = i == 0 || column == 0;
      const int64_t known = overlaps >> (kHalf && i % 2);
      const Words number = broadcast_word(uint16_t(numbers[at]));
      for (int64_t m = 0; m < known; m += 32) {
        store_words(wanted + m, alone ? number : add_signed(number, load_words(heard_before + column * row + m)));
      }
      const TrellisHeard heard{alone ? nullptr : heard_before, heard_after, row, t.feedback.columns + 16 * column, column};
      with_bits(i, [&]<int In, int Next>() __attribute__((always_inline)) {
        base = trellis_step_heard<In, Next, kDoublings>(t.code->values.data(), t.code->window, wanted, base, before, after,
                                                        choices + i * overlaps, heard);
      });
      exchange(before, after);
      exchange(heard_before, heard_after);
    }
  }

  // Numbers [count, count + 16) plus what the best path up to there passes on to their row.
  //
  // base: the least of the costs up to there.
  // windows, errors: of earlier calls' paths for the numbers before the last row.
  void hear_rows(int count, uint16_t base, int16_t* numbers, int32_t* windows, int32_t* errors) const {
    const auto is_among = [&](int64_t first) {  // 32 at once: a loop without a way out is made of vectors
      uint16_t found = 0;
      for (int64_t m = first; m < first + 32; ++m) found = uint16_t(found | (before[m] == base));
      return found;
    };
    int64_t best = 0;
    while (!is_among(best)) best += 32;
    while (before[best] != base) ++best;
    for (int i = count - 1; i >= 0; --i) {
      const auto [window, earlier] = one_back(best, i);
      if (i < count - 16 && windows[i] == window) break;  // from here on it is the path that was found before
      windows[i] = int32_t(window);
      errors[i] = trellis_number(t.numbers[i]) - int16_t(t.code->values[size_t(window)]);
      best = earlier;
    }
    for (int column = 0; column < 16; ++column) {
      int64_t sum = 0;
      for (int i = column; i < count; i += 16) sum += int64_t(t.feedback.rows[i - i % 16 + count / 16]) * errors[i];
      const int64_t number = numbers[count + column] + ((sum + (1 << 15)) >> 16);
      numbers[count + column] = int16_t(number > 32767 ? 32767 : number < -32767 ? -32767 : number);
    }
  }

  struct Back { int64_t window, overlap; };

  // The window of step i that led to an overlap, and the overlap before it.
  Back one_back(int64_t overlap, int i) const {
    const int odd = kHalf && i % 2, even = kHalf && !odd;
    const int64_t window = (int64_t(choices[i * overlaps + overlap]) << (t.code->window - Bits - even)) | overlap;
    return {window, window >> (Bits + odd)};
  }

  // Back from an overlap after the last of `count` numbers to the one before number `down_to`, telling of every window.
  template <typename Told> int64_t back(int64_t overlap, int count, int down_to, Told&& told) const {
    for (int i = count - 1; i >= down_to; --i) {
      const auto [window, earlier] = one_back(overlap, i);
      told(i, window);
      overlap = earlier;
    }
    return overlap;
  }
};

template <int Bits, bool kHalf> void trellis_tile(const TrellisTask& t) {
  constexpr int kTile = kbit::kTrellisTile, kSeam = kbit::trellis_seam(Bits);
  static_assert(kSeam % 2 == 0);
  TrellisPath<Bits, kHalf> path(t);
  memset(path.before, 0, size_t(2 * path.overlaps));
  const auto run = [&](int begin, int count) {
    if (t.feedback.columns) path.run_heard(begin, count);
    else path.run(begin, count);
  };
  run(kTile - kSeam, 2 * kSeam);
  int64_t end = 0;
  for (int64_t m = 1; m < path.overlaps; ++m) end = path.before[m] < path.before[end] ? m : end;
  const int64_t seam = path.back(end, 2 * kSeam, kSeam, [](int, int64_t) {});
  memset(path.before, 0xff, size_t(2 * path.overlaps));
  path.before[seam] = 0;
  run(0, kTile);
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
