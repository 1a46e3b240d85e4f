// The vector interface in plain C++, and its definition: every other file in this folder offers the same names with
// the same results, so that each kernel is written once and compiled once per instruction set.
//
//   Bytes   64 bytes          Ints   16 int32          Floats   16 float
//
// A compilation unit includes exactly one of these files. Everything lives in an anonymous namespace, and nothing from
// the standard library's templates is used here or in the kernels: an inline function that was compiled for AVX-512
// must never be the copy the linker keeps for a machine without it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

// Added to the int8 levels of a weight where the dot product wants one unsigned operand (x86 VNNI): 128; else 0.
constexpr int kLevelBias = 0;
// Registers a matmul tile may use: rows of x, and panels of 16 weight rows, that are accumulated at once.
constexpr int kTileRows = 2, kTilePanels = 1;
constexpr int kTileQuads = 1;  // of 4 columns, written out one after the other
// Codes of up to this many bits are decoded so fast that every line of them is to be asked for ahead (matmul.h).
constexpr int kPrefetchedBits = 3;

struct Bytes { uint8_t at[64]; };
struct Ints { int32_t at[16]; };
struct Floats { float at[16]; };

// ---------------------------------------------------------------------------------------------------- bytes

inline Bytes load_bytes(const uint8_t* p) { Bytes r; memcpy(r.at, p, 64); return r; }  // p: 64-byte aligned
inline void store_bytes(uint8_t* p, Bytes a) { memcpy(p, a.at, 64); }

// Every byte shifted right by N (left by -N): bits that cross from a neighbouring byte are the caller's to ignore.
template <int N> inline Bytes shift(Bytes a) {
  for (int i = 0; i < 64; ++i) a.at[i] = N >= 0 ? uint8_t(a.at[i] >> (N & 7)) : uint8_t(a.at[i] << (-N & 7));
  return a;
}

// (a & mask) | (b & ~mask), the same mask for every byte.
inline Bytes select_bits(uint8_t mask, Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.at[i] = uint8_t((a.at[i] & mask) | (b.at[i] & ~mask));
  return a;
}

inline Bytes and_bits(Bytes a, uint8_t mask) {
  for (int i = 0; i < 64; ++i) a.at[i] &= mask;
  return a;
}

inline Bytes xor_bits(Bytes a, uint8_t mask) {
  for (int i = 0; i < 64; ++i) a.at[i] ^= mask;
  return a;
}

// A lookup table of 2^IndexBits bytes (4 to 8 bits), and lookups by the low IndexBits bits of every byte.
template <int IndexBits> struct Table { uint8_t at[1 << IndexBits]; };

template <int IndexBits> inline Table<IndexBits> make_table(const uint8_t* entries) {
  Table<IndexBits> t;
  memcpy(t.at, entries, sizeof t.at);
  return t;
}

template <int IndexBits> inline Bytes lookup(const Table<IndexBits>& t, Bytes index) {
  for (int i = 0; i < 64; ++i) index.at[i] = t.at[index.at[i] & ((1 << IndexBits) - 1)];
  return index;
}

// ---------------------------------------------------------------------------------------------------- integers

inline Ints broadcast(int32_t v) { Ints r; for (int i = 0; i < 16; ++i) r.at[i] = v; return r; }
inline Ints load_ints(const int32_t* p) { Ints r; memcpy(r.at, p, 64); return r; }
inline void store_ints(int32_t* p, Ints a) { memcpy(p, a.at, 64); }
inline Ints add(Ints a, Ints b) { for (int i = 0; i < 16; ++i) a.at[i] += b.at[i]; return a; }
inline Ints and_bits(Ints a, int32_t mask) { for (int i = 0; i < 16; ++i) a.at[i] &= mask; return a; }
inline Ints or_bits(Ints a, Ints b) { for (int i = 0; i < 16; ++i) a.at[i] |= b.at[i]; return a; }
template <int N> inline Ints shift_right(Ints a) {  // logical
  for (int i = 0; i < 16; ++i) a.at[i] = int32_t(uint32_t(a.at[i]) >> N);
  return a;
}
template <int N> inline Ints shift_left(Ints a) {
  for (int i = 0; i < 16; ++i) a.at[i] = int32_t(uint32_t(a.at[i]) << N);
  return a;
}
inline Ints load_u8(const uint8_t* p) { Ints r; for (int i = 0; i < 16; ++i) r.at[i] = p[i]; return r; }  // 16 bytes
inline Ints load_u16(const uint16_t* p) { Ints r; for (int i = 0; i < 16; ++i) r.at[i] = p[i]; return r; }
inline Ints load_i8(const int8_t* p) { Ints r; for (int i = 0; i < 16; ++i) r.at[i] = p[i]; return r; }  // 16 bytes
inline Ints multiply(Ints a, int32_t factor) {  // the lower 32 bits
  for (int i = 0; i < 16; ++i) a.at[i] = int32_t(uint32_t(a.at[i]) * uint32_t(factor));
  return a;
}
inline Ints previous_lane(Ints a) {  // lane i has what lane i - 1 had, the first what the last had
  const int32_t last = a.at[15];
  for (int i = 15; i > 0; --i) a.at[i] = a.at[i - 1];
  a.at[0] = last;
  return a;
}
inline Ints as_ints(Bytes a) { Ints r; memcpy(r.at, a.at, 64); return r; }
inline Bytes as_bytes(Ints a) { Bytes r; memcpy(r.at, a.at, 64); return r; }

// sum[i] += w[4i] x[0] + .. + w[4i+3] x[3]: weights (int8 levels plus kLevelBias) against four int8 values, exactly.
// Levels are within [-127, 127]; x within [-127, 127].
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sum.at[i] += int32_t(int8_t(w.at[4 * i + j])) * x[j];
  return sum;
}

// The same products for weights that are codes from 0 on: sums that an instruction set may keep in 16 bits, as long as
// 127 times the codes of two columns, over all calls, stays within 32767; then they join the 32-bit ones. kPairs: whether
// this takes fewer instructions here than dot4 of Ints.
constexpr bool kPairs = false;
struct Pairs { Ints sums; };
inline Pairs no_pairs() { return {broadcast(0)}; }
inline Pairs dot4(Pairs sum, Bytes codes, const int8_t* x) { return {dot4(sum.sums, codes, x)}; }
inline Ints add(Ints sum, Pairs pairs) { return add(sum, pairs.sums); }

// ---------------------------------------------------------------------------------------------------- words

// 32 unsigned 16-bit numbers.
struct Words { uint16_t at[32]; };

inline Words load_words(const uint16_t* p) { Words r; memcpy(r.at, p, 64); return r; }  // any alignment
inline void store_words(uint16_t* p, Words a) { memcpy(p, a.at, 64); }
inline Words broadcast_word(uint16_t v) { Words r; for (int i = 0; i < 32; ++i) r.at[i] = v; return r; }
inline Words add_saturated(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t(a.at[i] + b.at[i] > 65535 ? 65535 : a.at[i] + b.at[i]);
  return a;
}
inline Words sub_saturated(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t(a.at[i] < b.at[i] ? 0 : a.at[i] - b.at[i]);
  return a;
}
inline Words min(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
  return a;
}
// |a - b| of signed numbers, at most 32768: the difference saturates.
inline Words distance(Words a, Words b) {
  for (int i = 0; i < 32; ++i) {
    const int d = int16_t(a.at[i]) - int16_t(b.at[i]);
    a.at[i] = uint16_t(d > 32767 ? 32767 : d < -32768 ? 32768 : d < 0 ? -d : d);
  }
  return a;
}
// Signed numbers: sums and differences that saturate, the size (of -32768: 32768), and a b / 2^15 to the nearest, halves
// up, where not both are -32768.
inline Words add_signed(Words a, Words b) {
  for (int i = 0; i < 32; ++i) {
    const int sum = int16_t(a.at[i]) + int16_t(b.at[i]);
    a.at[i] = uint16_t(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return a;
}
inline Words sub_signed(Words a, Words b) {
  for (int i = 0; i < 32; ++i) {
    const int d = int16_t(a.at[i]) - int16_t(b.at[i]);
    a.at[i] = uint16_t(d > 32767 ? 32767 : d < -32768 ? -32768 : d);
  }
  return a;
}
inline Words magnitude(Words a) {
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t(int16_t(a.at[i]) < 0 ? -int16_t(a.at[i]) : a.at[i]);
  return a;
}
inline Words multiply_rounded(Words a, Words b) {
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t((int16_t(a.at[i]) * int16_t(b.at[i]) + (1 << 14)) >> 15);
  return a;
}
inline Words high_square(Words a) {  // the upper 16 bits of a a
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t(uint32_t(a.at[i]) * a.at[i] >> 16);
  return a;
}
// p[lane >> Shift]: 32 >> Shift numbers (at least one), each 2^Shift times. 16 bytes may be read.
template <int Shift> inline Words spread(const uint16_t* p) {
  Words r;
  for (int i = 0; i < 32; ++i) r.at[i] = p[i >> Shift];
  return r;
}
inline Words and_words(Words a, Words b) { for (int i = 0; i < 32; ++i) a.at[i] &= b.at[i]; return a; }
inline Words multiply(Words a, uint16_t factor) {  // the lower 16 bits
  for (int i = 0; i < 32; ++i) a.at[i] = uint16_t(uint32_t(a.at[i]) * factor);
  return a;
}
// The upper half of (high, low) shifted left by N, 1 to 16.
template <int N> inline Words funnel(Words high, Words low) {
  for (int i = 0; i < 32; ++i) low.at[i] = uint16_t((uint32_t(high.at[i]) << 16 | low.at[i]) >> (16 - N));
  return low;
}
inline Words as_words(Ints a) { Words r; memcpy(r.at, a.at, 64); return r; }  // the lower half of a lane first
inline Bytes as_bytes(Words a) { Bytes r; memcpy(r.at, a.at, 64); return r; }
// The least of several numbers in every lane, and the first that was so small; and what came with it.
struct Least { Words value, which; };
struct LeastWith { Words value, which, with; };
inline void keep_less(Least& least, Words value, int which) {
  for (int i = 0; i < 32; ++i) {
    if (value.at[i] >= least.value.at[i]) continue;
    least.value.at[i] = value.at[i];
    least.which.at[i] = uint16_t(which);
  }
}
inline void keep_less(LeastWith& least, Words value, int which, Words with) {
  for (int i = 0; i < 32; ++i) {
    if (value.at[i] >= least.value.at[i]) continue;
    least.value.at[i] = value.at[i];
    least.which.at[i] = uint16_t(which);
    least.with.at[i] = with.at[i];
  }
}
// p[which * stride + (lane >> Shift)]: of each choice, 0 .. Choices - 1, what spread<Shift>(p + choice * stride) has.
template <int Shift, int Choices> inline Words pick(const uint16_t* p, int64_t stride, Words which) {
  Words r;
  for (int i = 0; i < 32; ++i) r.at[i] = p[which.at[i] * stride + (i >> Shift)];
  return r;
}
inline void store_low_bytes(uint8_t* p, Words a) { for (int i = 0; i < 32; ++i) p[i] = uint8_t(a.at[i]); }
inline uint16_t reduce_min(Words a) {
  uint16_t least = a.at[0];
  for (int i = 1; i < 32; ++i) least = a.at[i] < least ? a.at[i] : least;
  return least;
}

// ---------------------------------------------------------------------------------------------------- floats

// sum[i] += w[2i] x[0] + w[2i+1] x[1] for bfloat16 pairs; products and sums in fp32, in whatever order and with whatever
// treatment of subnormals the instruction set has. Only where kHasBf16.
constexpr bool kHasBf16 = false;

inline Floats zero() { Floats r; memset(r.at, 0, 64); return r; }
inline Floats broadcast(float v) { Floats r; for (int i = 0; i < 16; ++i) r.at[i] = v; return r; }
inline Floats load(const float* p) { Floats r; memcpy(r.at, p, 64); return r; }  // any alignment
inline void store(float* p, Floats a) { memcpy(p, a.at, 64); }
inline Floats add(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] += b.at[i]; return a; }
inline Floats sub(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] -= b.at[i]; return a; }
inline Floats mul(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] *= b.at[i]; return a; }
inline Floats div(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] /= b.at[i]; return a; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a * b + c, rounded once
  for (int i = 0; i < 16; ++i) c.at[i] = fmaf(a.at[i], b.at[i], c.at[i]);
  return c;
}
inline Floats max(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i]; return a; }
inline Floats min(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; return a; }
inline Floats abs(Floats a) { for (int i = 0; i < 16; ++i) a.at[i] = fabsf(a.at[i]); return a; }
inline Floats to_float(Ints a) { Floats r; for (int i = 0; i < 16; ++i) r.at[i] = float(a.at[i]); return r; }
// To the nearest integer, ties to even; |a| < 2^31.
inline Ints round_to_int(Floats a) { Ints r; for (int i = 0; i < 16; ++i) r.at[i] = int32_t(rintf(a.at[i])); return r; }
inline Ints bits_of(Floats a) { Ints r; memcpy(r.at, a.at, 64); return r; }
inline Floats from_bits(Ints a) { Floats r; memcpy(r.at, a.at, 64); return r; }

// The sum of the lanes, always in this order: halves onto each other, 16 -> 8 -> 4 -> 2 -> 1.
inline float reduce_add(Floats a) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.at[i] += a.at[i + n];
  return a.at[0];
}
inline float reduce_max(Floats a) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.at[i] = a.at[i] > a.at[i + n] ? a.at[i] : a.at[i + n];
  return a.at[0];
}

// Lane i has what lane i ^ N had; N is 1, 2, 4 or 8.
template <int N> inline Floats swap_lanes(Floats a) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = a.at[i ^ N];
  return r;
}

// The first n lanes (0 <= n <= 16); the others are zero, and are not read or written.
inline Floats load_first(const float* p, int n) { Floats r = zero(); memcpy(r.at, p, 4 * size_t(n)); return r; }
inline void store_first(float* p, Floats a, int n) { memcpy(p, a.at, 4 * size_t(n)); }

// 16 values of half precision (IEEE) or bfloat16.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude * 2^-24 is exact
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {  // nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24
    float value;
    memcpy(&value, &magnitude, 4);
    return uint16_t(sign | uint16_t(int32_t(rintf(value * 16777216.0f))));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - (112u << 23)) >> 13));
}
inline Floats load_half(const uint16_t* p) { Floats r; for (int i = 0; i < 16; ++i) r.at[i] = half_to_float(p[i]); return r; }
inline void store_half(uint16_t* p, Floats a) { for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.at[i]); }
inline Floats load_bfloat(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }

// table[index], for a table of 2^IndexBits floats; the index is below that.
template <int IndexBits> inline Floats lookup(const float* table, Ints index) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = table[index.at[i]];
  return r;
}

// The lowest byte of every lane, 16 bytes.
inline void store_low_bytes(int8_t* p, Ints a) { for (int i = 0; i < 16; ++i) p[i] = int8_t(a.at[i]); }

inline void prefetch(const void*) {}  // a hint: the cache line will be read soon
inline void prefetch_second(const void*) {}  // the same, into the second-level cache

}  // namespace
