// What one instruction set makes of given data: every operation of the vector interface, applied and written down, so
// that tests compare each instruction set with scalar.h byte for byte. Include after exactly one header of this folder.
//
// Input: records of 192 bytes (three vectors a, b, c); a shorter remainder is ignored. Output: for each record the
// sections below in a fixed order, each as {uint16 tag, uint16 size, size bytes}, in the machine's byte order.
// What the interface leaves open is kept out: bits that cross bytes in shift are masked, int sums do not overflow,
// weights and activations are within [-127, 127], rounded floats below 2^31, and every NaN that an operation makes is
// written as the same one (its sign and payload differ between machines).
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

enum class Tag : uint16_t {
  kLoadBytes, kShift, kSelectBits, kAndBytes, kLookup4, kLookup5, kLookup6, kLookup7, kLookup8,            // 0 .. 8
  kBroadcastInt, kLoadInts, kAddInts, kAndInts, kOrInts, kShiftRight, kShiftLeft, kLoadU8, kLoadU16,       // 9 .. 17
  kAsInts, kDot4, kZero, kBroadcastFloat, kLoad, kAdd, kSub, kMul, kDiv, kFma, kMax, kMin, kAbs,           // 18 .. 30
  kToFloat, kRoundToInt, kReduceAdd, kReduceMax, kLoadFirst, kStoreFirst, kLoadHalf, kStoreHalf,           // 31 .. 38
  kLoadBfloat, kFloatLookup, kStoreLowBytes, kXorBytes, kHalfToFloat, kFloatToHalf, kLoadI8, kDot4Pairs,   // 39 .. 46
  kMultiply, kPreviousLane, kSwapLanes, kWords, kFunnel, kSpread, kLeast, kStoreLowWords, kReduceMin,      // 47 .. 55
};

// Writes while there is room, and counts always.
struct Trace {
  uint8_t* out;
  int64_t capacity, size = 0;

  void bytes(const void* p, int64_t n) {
    if (size + n <= capacity) memcpy(out + size, p, size_t(n));
    size += n;
  }
  void section(Tag tag, const void* p, int64_t n) {
    const uint16_t header[2] = {uint16_t(tag), uint16_t(n)};
    bytes(header, 4);
    bytes(p, n);
  }
  void put(Tag tag, Bytes a) {
    alignas(64) uint8_t at[64];
    store_bytes(at, a);
    section(tag, at, 64);
  }
  void put(Tag tag, Ints a) {
    int32_t at[16];
    store_ints(at, a);
    section(tag, at, 64);
  }
  void put(Tag tag, Words a) {
    uint16_t at[32];
    store_words(at, a);
    section(tag, at, 64);
  }
  void put(Tag tag, Floats a) {
    uint32_t at[16];
    memcpy_floats(at, a);
    for (uint32_t& v : at)
      if ((v & 0x7fffffff) > 0x7f800000) v = 0x7fc00000;
    section(tag, at, 64);
  }
  void put_halves(Tag tag, const uint16_t* halves) {
    uint16_t at[16];
    for (int i = 0; i < 16; ++i) at[i] = (halves[i] & 0x7fff) > 0x7c00 ? uint16_t(0x7e00) : halves[i];
    section(tag, at, 32);
  }
  void put(Tag tag, float a) { put(tag, broadcast(a)); }
  static void memcpy_floats(uint32_t* at, Floats a) {
    float values[16];
    store(values, a);
    memcpy(at, values, 64);
  }
};

template <int N> inline void trace_shift(Trace& t, Bytes a) {
  t.put(Tag::kShift, and_bits(shift<N>(a), uint8_t(N >= 0 ? 0xff >> (N & 7) : 0xff << (-N & 7))));
  if constexpr (N < 7) trace_shift<N + 1>(t, a);
}

template <int IndexBits> inline void trace_lookup(Trace& t, const uint8_t* entries, Bytes index) {
  const Table<IndexBits> table = make_table<IndexBits>(entries);
  t.put(Tag(int(Tag::kLookup4) + IndexBits - 4), lookup<IndexBits>(table, index));
  if constexpr (IndexBits < 8) trace_lookup<IndexBits + 1>(t, entries, index);
}

template <int IndexBits> inline void trace_float_lookup(Trace& t, const float* table, Ints index) {
  t.put(Tag::kFloatLookup, lookup<IndexBits>(table, and_bits(index, (1 << IndexBits) - 1)));
  if constexpr (IndexBits < 8) trace_float_lookup<IndexBits + 1>(t, table, index);
}

template <int N> inline void trace_shift_ints(Trace& t, Ints a) {
  t.put(Tag::kShiftRight, shift_right<N>(a));
  t.put(Tag::kShiftLeft, shift_left<N>(a));
  if constexpr (N < 31) trace_shift_ints<N + 1>(t, a);
}

inline int8_t level_of(uint8_t byte) { return byte == 128 ? int8_t(-127) : int8_t(byte); }

inline void trace_bytes(Trace& t, const uint8_t* a, const uint8_t* b, const uint8_t* c) {
  const Bytes va = load_bytes(a), vb = load_bytes(b);
  t.put(Tag::kLoadBytes, va);
  trace_shift<-7>(t, va);
  for (int i = 0; i < 4; ++i) {
    t.put(Tag::kSelectBits, select_bits(c[i], va, vb));
    t.put(Tag::kAndBytes, and_bits(va, c[i]));
    t.put(Tag::kXorBytes, xor_bits(va, c[i]));
  }
  uint8_t entries[256];  // every one different from its neighbours and from those 64 further on
  for (int i = 0; i < 256; ++i) entries[i] = uint8_t((b[i % 64] ^ c[(i / 4) % 64]) + 37 * i + i / 64);
  trace_lookup<4>(t, entries, va);
}

template <int N> inline void trace_funnel(Trace& t, Words a, Words b) {
  t.put(Tag::kFunnel, funnel<N>(a, b));
  if constexpr (N < 16) trace_funnel<N + 1>(t, a, b);
}

template <int Shift> inline void trace_spread(Trace& t, const uint16_t* p) {
  t.put(Tag::kSpread, spread<Shift>(p));
  if constexpr (Shift < 6) trace_spread<Shift + 1>(t, p);
}

template <int Shift, int Next> inline void trace_pick(Trace& t, const uint16_t* numbers, Words which) {
  constexpr int kChoices = 1 << Next, kStride = 8;
  uint16_t all[(kChoices + 1) * kStride];
  for (int i = 0; i < (kChoices + 1) * kStride; ++i) all[i] = uint16_t(numbers[i % 32] + 1001 * i);
  t.put(Tag::kSpread, pick<Shift, kChoices>(all, kStride, and_words(which, broadcast_word(kChoices - 1))));
}

inline void trace_words(Trace& t, const uint8_t* a, const uint8_t* b, const uint8_t* c) {
  uint16_t of_a[32], of_b[32], of_c[32];
  memcpy(of_a, a, 64), memcpy(of_b, b, 64), memcpy(of_c, c, 64);
  const Words va = load_words(of_a), vb = load_words(of_b), vc = load_words(of_c);
  const Words several[] = {add_saturated(va, vb), sub_saturated(va, vb), min(va, vb), distance(va, vb), high_square(va),
                           and_words(va, vb), multiply(va, of_b[0]), broadcast_word(of_c[0])};
  for (const Words& v : several) t.put(Tag::kWords, v);
  const Ints ints = as_ints(load_bytes(a));
  t.put(Tag::kWords, as_words(ints));
  t.put(Tag::kWords, as_bytes(va));
  t.put(Tag::kMultiply, multiply(ints, int32_t(0x83DCD12Du)));
  t.put(Tag::kPreviousLane, previous_lane(ints));
  trace_funnel<1>(t, va, vb);
  trace_spread<1>(t, of_a);
  Least least{va, broadcast_word(0)};
  keep_less(least, vb, 1);
  keep_less(least, vc, 2);
  t.put(Tag::kLeast, least.value);
  t.put(Tag::kLeast, least.which);
  const Words of_signed[] = {add_signed(va, vb), sub_signed(va, vb), magnitude(va)};
  for (const Words& v : of_signed) t.put(Tag::kWords, v);
  t.put(Tag::kWords, multiply_rounded(va, magnitude(broadcast_word(of_b[0] & 0x7fff))));  // (not both the least there is)
  LeastWith with{va, broadcast_word(0), vc};
  keep_less(with, vb, 1, va);
  keep_less(with, vc, 2, vb);
  t.put(Tag::kLeast, with.value);
  t.put(Tag::kLeast, with.which);
  t.put(Tag::kLeast, with.with);
  trace_pick<2, 2>(t, of_a, vb), trace_pick<2, 3>(t, of_a, vb), trace_pick<3, 2>(t, of_a, vb);
  trace_pick<3, 3>(t, of_a, vb), trace_pick<3, 4>(t, of_a, vb), trace_pick<4, 4>(t, of_a, vb);
  trace_pick<5, 5>(t, of_a, vb), trace_pick<5, 6>(t, of_a, vb), trace_pick<6, 6>(t, of_a, vb);
  uint8_t low[32];
  store_low_bytes(low, va);
  t.section(Tag::kStoreLowWords, low, 32);
  const uint16_t least_word = reduce_min(va);
  t.section(Tag::kReduceMin, &least_word, 2);
  float floats[16];
  for (int i = 0; i < 16; ++i) floats[i] = float(of_a[i]);
  const Floats f = load(floats);
  t.put(Tag::kSwapLanes, swap_lanes<1>(f));
  t.put(Tag::kSwapLanes, swap_lanes<2>(f));
  t.put(Tag::kSwapLanes, swap_lanes<4>(f));
  t.put(Tag::kSwapLanes, swap_lanes<8>(f));
}

inline void trace_ints(Trace& t, const uint8_t* a, const uint8_t* b, const uint8_t* c) {
  int32_t ints[16];
  memcpy(ints, a, 64);
  const Ints va = load_ints(ints);
  const Ints quarter_b = shift_right<2>(as_ints(load_bytes(b))), quarter_c = shift_right<2>(as_ints(load_bytes(c)));
  t.put(Tag::kBroadcastInt, broadcast(ints[0]));
  t.put(Tag::kLoadInts, va);
  t.put(Tag::kAddInts, add(quarter_b, quarter_c));
  t.put(Tag::kAndInts, and_bits(va, ints[1]));
  t.put(Tag::kOrInts, or_bits(va, quarter_b));
  trace_shift_ints<0>(t, va);
  uint16_t words[16];
  memcpy(words, b, 32);
  t.put(Tag::kLoadU8, load_u8(b));
  t.put(Tag::kLoadU16, load_u16(words));
  t.put(Tag::kLoadI8, load_i8(reinterpret_cast<const int8_t*>(b)));
  t.put(Tag::kAsInts, as_bytes(add(as_ints(load_bytes(a)), broadcast(0))));

  alignas(64) uint8_t weights[64];
  int8_t x[64];
  for (int i = 0; i < 64; ++i) weights[i] = uint8_t(level_of(a[i]) + kLevelBias), x[i] = level_of(b[i]);
  for (int k = 0; k < 64; k += 4) {  // the bias counts each of the four x values kLevelBias times
    const int bias = kLevelBias * (x[k] + x[k + 1] + x[k + 2] + x[k + 3]);
    t.put(Tag::kDot4, add(dot4(quarter_c, load_bytes(weights), x + k), broadcast(-bias)));
  }
  for (int i = 0; i < 64; ++i) weights[i] = a[i] & 15;  // codes of 4 bits, of which 8 quads fit 16 bits
  Pairs pairs = no_pairs();
  for (int k = 0; k < 32; k += 4) pairs = dot4(pairs, load_bytes(weights), x + k);
  t.put(Tag::kDot4Pairs, add(quarter_c, pairs));
  alignas(64) int8_t low[64];
  for (int i = 0; i < 64; i += 16) store_low_bytes(low + i, i < 32 ? va : quarter_b);
  t.section(Tag::kStoreLowBytes, low, 64);
}

inline void trace_floats(Trace& t, const uint8_t* a, const uint8_t* b, const uint8_t* c) {
  float at[48];
  memcpy(at, a, 64), memcpy(at + 16, b, 64), memcpy(at + 32, c, 64);
  const Floats va = load(at), vb = load(at + 16), vc = load(at + 32);
  t.put(Tag::kZero, zero());
  t.put(Tag::kBroadcastFloat, broadcast(at[0]));
  t.put(Tag::kLoad, from_bits(bits_of(va)));
  t.put(Tag::kAdd, add(va, vb));
  t.put(Tag::kSub, sub(va, vb));
  t.put(Tag::kMul, mul(va, vb));
  t.put(Tag::kDiv, div(va, vb));
  t.put(Tag::kFma, fma(va, vb, vc));
  t.put(Tag::kFma, add(mul(abs(va), vb), vc));  // rounded twice: not to be fused, though the product has no other use
  t.put(Tag::kMax, max(va, vb));
  t.put(Tag::kMin, min(va, vb));
  t.put(Tag::kAbs, abs(va));
  t.put(Tag::kToFloat, to_float(bits_of(va)));
  // Halves of 20-bit integers, so that ties occur, and whatever a holds, as far as it fits.
  const Floats twenty_bits = sub(to_float(shift_right<12>(bits_of(vb))), broadcast(524288.0f));
  t.put(Tag::kRoundToInt, round_to_int(mul(twenty_bits, broadcast(0.5f))));
  t.put(Tag::kRoundToInt, round_to_int(min(max(va, broadcast(-2147483520.0f)), broadcast(2147483520.0f))));
  t.put(Tag::kReduceAdd, reduce_add(va));
  t.put(Tag::kReduceMax, reduce_max(va));
  for (int n = 0; n <= 16; ++n) {
    t.put(Tag::kLoadFirst, load_first(at + 16 - n, n));
    float stored[16];
    memcpy(stored, c, 64);
    store_first(stored, va, n);
    t.section(Tag::kStoreFirst, stored, 64);
  }
}

inline void trace_conversions(Trace& t, const uint8_t* record, const uint8_t* a, const uint8_t* b) {
  uint16_t half[96];
  memcpy(half, record, 192);
  for (int i = 0; i < 96; i += 16) {
    t.put(Tag::kLoadHalf, load_half(half + i));
    float one[16];
    for (int j = 0; j < 16; ++j) one[j] = half_to_float(half[i + j]);
    t.put(Tag::kHalfToFloat, load(one));
    t.put(Tag::kLoadBfloat, load_bfloat(half + i));
  }
  float values[48];
  memcpy(values, record, 192);
  for (int i = 0; i < 48; i += 16) {
    uint16_t stored[16], one[16];
    store_half(stored, load(values + i));
    for (int j = 0; j < 16; ++j) one[j] = float_to_half(values[i + j]);
    t.put_halves(Tag::kStoreHalf, stored);
    t.put_halves(Tag::kFloatToHalf, one);
  }
  float table[256];
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t bits;
    memcpy(&bits, b + 4 * (i % 16), 4);
    bits += i * 0x01000193u;
    memcpy(table + i, &bits, 4);
  }
  trace_float_lookup<1>(t, table, as_ints(load_bytes(a)));
}

// Returns the bytes of the whole trace; out holds the front of it where out_bytes is less.
int64_t trace(const uint8_t* in, int64_t in_bytes, uint8_t* out, int64_t out_bytes) {
  Trace t{out, out_bytes};
  for (; in_bytes >= 192; in += 192, in_bytes -= 192) {
    alignas(64) uint8_t record[192];
    memcpy(record, in, 192);
    prefetch(in + 192);
    trace_bytes(t, record, record + 64, record + 128);
    trace_ints(t, record, record + 64, record + 128);
    trace_words(t, record, record + 64, record + 128);
    trace_floats(t, record, record + 64, record + 128);
    trace_conversions(t, record, record, record + 64);
  }
  return t.size;
}

}  // namespace
