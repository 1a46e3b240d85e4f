// The vector interface of scalar.h for Arm (AArch64) with the dot product instructions: every type is four 128-bit
// quarters. Compile with -march=armv8.2-a+dotprod -ffp-contract=off (the compiler sees through these intrinsics, and
// would otherwise fuse a mul and an add that the interface rounds twice). The conversions to and from half precision
// belong to every AArch64 machine.
#pragma once

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLevelBias = 0;
// 32 registers: 6 x 1 accumulators are 24 of them, the weights 4, x and what is being decoded the rest.
constexpr int kTileRows = 6, kTilePanels = 1;
constexpr int kTileQuads = 1;
constexpr int kPrefetchedBits = 3;

struct Bytes { uint8x16_t q[4]; };
struct Ints { int32x4_t q[4]; };
struct Floats { float32x4_t q[4]; };

// ---------------------------------------------------------------------------------------------------- bytes

inline Bytes load_bytes(const uint8_t* p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
inline void store_bytes(uint8_t* p, Bytes a) { for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, a.q[i]); }

template <int N> inline Bytes shift(Bytes a) {
  for (int i = 0; i < 4; ++i) {
    if constexpr (N > 0) a.q[i] = vshrq_n_u8(a.q[i], N);
    if constexpr (N < 0) a.q[i] = vshlq_n_u8(a.q[i], -N);
  }
  return a;
}

inline Bytes select_bits(uint8_t mask, Bytes a, Bytes b) {
  for (int i = 0; i < 4; ++i) a.q[i] = vbslq_u8(vdupq_n_u8(mask), a.q[i], b.q[i]);
  return a;
}

inline Bytes and_bits(Bytes a, uint8_t mask) {
  for (int i = 0; i < 4; ++i) a.q[i] = vandq_u8(a.q[i], vdupq_n_u8(mask));
  return a;
}

inline Bytes xor_bits(Bytes a, uint8_t mask) {
  for (int i = 0; i < 4; ++i) a.q[i] = veorq_u8(a.q[i], vdupq_n_u8(mask));
  return a;
}

// TBL reads a table of one, two or four registers and gives 0 for an index beyond it; TBX keeps its accumulator there.
template <int IndexBits> struct Table { uint8x16_t part[IndexBits > 4 ? 1 << (IndexBits - 4) : 1]; };

template <int IndexBits> inline Table<IndexBits> make_table(const uint8_t* entries) {
  static_assert(IndexBits >= 4 && IndexBits <= 8);
  Table<IndexBits> t;
  for (int j = 0; j < 1 << (IndexBits - 4); ++j) t.part[j] = vld1q_u8(entries + 16 * j);
  return t;
}

inline uint8x16x4_t four_parts(const uint8x16_t* part) { return {{part[0], part[1], part[2], part[3]}}; }

template <int IndexBits> inline uint8x16_t lookup128(const Table<IndexBits>& t, uint8x16_t index) {
  if constexpr (IndexBits < 8) index = vandq_u8(index, vdupq_n_u8((1 << IndexBits) - 1));
  if constexpr (IndexBits == 4) {
    return vqtbl1q_u8(t.part[0], index);
  } else if constexpr (IndexBits == 5) {
    return vqtbl2q_u8(uint8x16x2_t{{t.part[0], t.part[1]}}, index);
  } else {
    uint8x16_t r = vqtbl4q_u8(four_parts(t.part), index);
    for (int j = 4; j < 1 << (IndexBits - 4); j += 4)  // index ^ 16 j is below 64 for this part's entries alone
      r = vqtbx4q_u8(r, four_parts(t.part + j), veorq_u8(index, vdupq_n_u8(uint8_t(16 * j))));
    return r;
  }
}
template <int IndexBits> inline Bytes lookup(const Table<IndexBits>& t, Bytes index) {
  for (int i = 0; i < 4; ++i) index.q[i] = lookup128<IndexBits>(t, index.q[i]);
  return index;
}

// ---------------------------------------------------------------------------------------------------- integers

inline Ints broadcast(int32_t v) { const int32x4_t q = vdupq_n_s32(v); return {{q, q, q, q}}; }
inline Ints load_ints(const int32_t* p) {
  return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
}
inline void store_ints(int32_t* p, Ints a) { for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.q[i]); }
inline Ints add(Ints a, Ints b) { for (int i = 0; i < 4; ++i) a.q[i] = vaddq_s32(a.q[i], b.q[i]); return a; }
inline Ints and_bits(Ints a, int32_t mask) {
  for (int i = 0; i < 4; ++i) a.q[i] = vandq_s32(a.q[i], vdupq_n_s32(mask));
  return a;
}
inline Ints or_bits(Ints a, Ints b) { for (int i = 0; i < 4; ++i) a.q[i] = vorrq_s32(a.q[i], b.q[i]); return a; }
template <int N> inline Ints shift_right(Ints a) {
  if constexpr (N > 0)
    for (int i = 0; i < 4; ++i) a.q[i] = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.q[i]), N));
  return a;
}
template <int N> inline Ints shift_left(Ints a) {
  for (int i = 0; i < 4; ++i) a.q[i] = vshlq_n_s32(a.q[i], N);
  return a;
}
inline Ints load_u16(const uint16_t* p) {
  const uint16x8_t a = vld1q_u16(p), b = vld1q_u16(p + 8);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))), vreinterpretq_s32_u32(vmovl_high_u16(a)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))), vreinterpretq_s32_u32(vmovl_high_u16(b))}};
}
inline Ints load_i8(const int8_t* p) {
  const int8x16_t v = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
           vmovl_s16(vget_high_s16(high))}};
}
inline Ints load_u8(const uint8_t* p) {
  const uint8x16_t v = vld1q_u8(p);
  const uint16x8_t a = vmovl_u8(vget_low_u8(v)), b = vmovl_high_u8(v);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))), vreinterpretq_s32_u32(vmovl_high_u16(a)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))), vreinterpretq_s32_u32(vmovl_high_u16(b))}};
}
inline Ints multiply(Ints a, int32_t factor) {
  for (int i = 0; i < 4; ++i) a.q[i] = vmulq_n_s32(a.q[i], factor);
  return a;
}
inline Ints previous_lane(Ints a) {
  return {{vextq_s32(a.q[3], a.q[0], 3), vextq_s32(a.q[0], a.q[1], 3), vextq_s32(a.q[1], a.q[2], 3),
           vextq_s32(a.q[2], a.q[3], 3)}};
}
inline Ints as_ints(Bytes a) { Ints r; for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_s32_u8(a.q[i]); return r; }
inline Bytes as_bytes(Ints a) { Bytes r; for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_u8_s32(a.q[i]); return r; }

inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sum.q[i] = vdotq_s32(sum.q[i], vreinterpretq_s8_u8(w.q[i]), v);
  return sum;
}

// SDOT adds to 32 bits at no cost; codes of up to 7 bits are signed bytes as they are.
constexpr bool kPairs = false;
struct Pairs { Ints sums; };
inline Pairs no_pairs() { return {broadcast(0)}; }
inline Pairs dot4(Pairs sum, Bytes codes, const int8_t* x) { return {dot4(sum.sums, codes, x)}; }
inline Ints add(Ints sum, Pairs pairs) { return add(sum, pairs.sums); }

// ---------------------------------------------------------------------------------------------------- words

struct Words { uint16x8_t q[4]; };

inline Words load_words(const uint16_t* p) {
  return {{vld1q_u16(p), vld1q_u16(p + 8), vld1q_u16(p + 16), vld1q_u16(p + 24)}};
}
inline void store_words(uint16_t* p, Words a) { for (int i = 0; i < 4; ++i) vst1q_u16(p + 8 * i, a.q[i]); }
inline Words broadcast_word(uint16_t v) { const uint16x8_t q = vdupq_n_u16(v); return {{q, q, q, q}}; }
inline Words add_saturated(Words a, Words b) {
  for (int i = 0; i < 4; ++i) a.q[i] = vqaddq_u16(a.q[i], b.q[i]);
  return a;
}
inline Words sub_saturated(Words a, Words b) {
  for (int i = 0; i < 4; ++i) a.q[i] = vqsubq_u16(a.q[i], b.q[i]);
  return a;
}
inline Words min(Words a, Words b) { for (int i = 0; i < 4; ++i) a.q[i] = vminq_u16(a.q[i], b.q[i]); return a; }
inline Words distance(Words a, Words b) {
  for (int i = 0; i < 4; ++i) {
    const int16x8_t d = vqsubq_s16(vreinterpretq_s16_u16(a.q[i]), vreinterpretq_s16_u16(b.q[i]));
    a.q[i] = vreinterpretq_u16_s16(vabsq_s16(d));
  }
  return a;
}
inline Words add_signed(Words a, Words b) {
  for (int i = 0; i < 4; ++i) {
    a.q[i] = vreinterpretq_u16_s16(vqaddq_s16(vreinterpretq_s16_u16(a.q[i]), vreinterpretq_s16_u16(b.q[i])));
  }
  return a;
}
inline Words sub_signed(Words a, Words b) {
  for (int i = 0; i < 4; ++i) {
    a.q[i] = vreinterpretq_u16_s16(vqsubq_s16(vreinterpretq_s16_u16(a.q[i]), vreinterpretq_s16_u16(b.q[i])));
  }
  return a;
}
inline Words magnitude(Words a) {
  for (int i = 0; i < 4; ++i) a.q[i] = vreinterpretq_u16_s16(vabsq_s16(vreinterpretq_s16_u16(a.q[i])));
  return a;
}
inline Words multiply_rounded(Words a, Words b) {
  for (int i = 0; i < 4; ++i) {
    a.q[i] = vreinterpretq_u16_s16(vqrdmulhq_s16(vreinterpretq_s16_u16(a.q[i]), vreinterpretq_s16_u16(b.q[i])));
  }
  return a;
}
inline Words high_square(Words a) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t low = vmull_u16(vget_low_u16(a.q[i]), vget_low_u16(a.q[i])), high = vmull_high_u16(a.q[i], a.q[i]);
    a.q[i] = vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
  }
  return a;
}
template <int Shift> inline Words spread(const uint16_t* p) {
  if constexpr (Shift >= 5) return broadcast_word(*p);
  uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = p[i >> Shift];
  return load_words(lanes);
}
inline Words and_words(Words a, Words b) { for (int i = 0; i < 4; ++i) a.q[i] = vandq_u16(a.q[i], b.q[i]); return a; }
inline Words multiply(Words a, uint16_t factor) {
  for (int i = 0; i < 4; ++i) a.q[i] = vmulq_n_u16(a.q[i], factor);
  return a;
}
template <int N> inline Words funnel(Words high, Words low) {
  if constexpr (N == 16) return low;
  else {
    for (int i = 0; i < 4; ++i) low.q[i] = vorrq_u16(vshlq_n_u16(high.q[i], N), vshrq_n_u16(low.q[i], 16 - N));
    return low;
  }
}
inline Words as_words(Ints a) {
  Words r;
  for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_u16_s32(a.q[i]);
  return r;
}
inline Bytes as_bytes(Words a) { Bytes r; for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_u8_u16(a.q[i]); return r; }
struct Least { Words value, which; };
struct LeastWith { Words value, which, with; };
inline void keep_less(Least& least, Words value, int which) {
  const uint16x8_t w = vdupq_n_u16(uint16_t(which));
  for (int i = 0; i < 4; ++i) {
    const uint16x8_t less = vcltq_u16(value.q[i], least.value.q[i]);
    least.value.q[i] = vminq_u16(value.q[i], least.value.q[i]);
    least.which.q[i] = vbslq_u16(less, w, least.which.q[i]);
  }
}
inline void keep_less(LeastWith& least, Words value, int which, Words with) {
  const uint16x8_t w = vdupq_n_u16(uint16_t(which));
  for (int i = 0; i < 4; ++i) {
    const uint16x8_t less = vcltq_u16(value.q[i], least.value.q[i]);
    least.value.q[i] = vminq_u16(value.q[i], least.value.q[i]);
    least.which.q[i] = vbslq_u16(less, w, least.which.q[i]);
    least.with.q[i] = vbslq_u16(less, with.q[i], least.with.q[i]);
  }
}
template <int Shift, int Choices> inline Words pick(const uint16_t* p, int64_t stride, Words which) {
  Words found = spread<Shift>(p);
  for (int j = 1; j < Choices; ++j) {
    const Words a = spread<Shift>(p + j * stride);
    const uint16x8_t w = vdupq_n_u16(uint16_t(j));
    for (int i = 0; i < 4; ++i) found.q[i] = vbslq_u16(vceqq_u16(which.q[i], w), a.q[i], found.q[i]);
  }
  return found;
}
inline void store_low_bytes(uint8_t* p, Words a) {
  for (int i = 0; i < 4; ++i) vst1_u8(p + 8 * i, vmovn_u16(a.q[i]));
}
inline uint16_t reduce_min(Words a) {
  return vminvq_u16(vminq_u16(vminq_u16(a.q[0], a.q[1]), vminq_u16(a.q[2], a.q[3])));
}

// ---------------------------------------------------------------------------------------------------- floats

constexpr bool kHasBf16 = false;

inline Floats broadcast(float v) { const float32x4_t q = vdupq_n_f32(v); return {{q, q, q, q}}; }
inline Floats zero() { return broadcast(0.0f); }
inline Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline void store(float* p, Floats a) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]); }
inline Floats add(Floats a, Floats b) { for (int i = 0; i < 4; ++i) a.q[i] = vaddq_f32(a.q[i], b.q[i]); return a; }
inline Floats sub(Floats a, Floats b) { for (int i = 0; i < 4; ++i) a.q[i] = vsubq_f32(a.q[i], b.q[i]); return a; }
inline Floats mul(Floats a, Floats b) { for (int i = 0; i < 4; ++i) a.q[i] = vmulq_f32(a.q[i], b.q[i]); return a; }
inline Floats div(Floats a, Floats b) { for (int i = 0; i < 4; ++i) a.q[i] = vdivq_f32(a.q[i], b.q[i]); return a; }
inline Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 4; ++i) c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
  return c;
}
// Compare and select, as FMAX and FMIN treat NaN and zeros of both signs otherwise than "a > b ? a : b".
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Floats max(Floats a, Floats b) { for (int i = 0; i < 4; ++i) a.q[i] = larger(a.q[i], b.q[i]); return a; }
inline Floats min(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.q[i] = vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
  return a;
}
inline Floats abs(Floats a) { for (int i = 0; i < 4; ++i) a.q[i] = vabsq_f32(a.q[i]); return a; }
inline Floats to_float(Ints a) { Floats r; for (int i = 0; i < 4; ++i) r.q[i] = vcvtq_f32_s32(a.q[i]); return r; }
inline Ints round_to_int(Floats a) { Ints r; for (int i = 0; i < 4; ++i) r.q[i] = vcvtnq_s32_f32(a.q[i]); return r; }
inline Ints bits_of(Floats a) { Ints r; for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_s32_f32(a.q[i]); return r; }
inline Floats from_bits(Ints a) {
  Floats r;
  for (int i = 0; i < 4; ++i) r.q[i] = vreinterpretq_f32_s32(a.q[i]);
  return r;
}

inline float reduce_add(Floats a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float reduce_max(Floats a) {
  const float32x4_t four = larger(larger(a.q[0], a.q[2]), larger(a.q[1], a.q[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  const float first = vgetq_lane_f32(two, 0), second = vgetq_lane_f32(two, 1);
  return first > second ? first : second;
}

template <int N> inline Floats swap_lanes(Floats a) {
  if constexpr (N == 4) return {{a.q[1], a.q[0], a.q[3], a.q[2]}};
  if constexpr (N == 8) return {{a.q[2], a.q[3], a.q[0], a.q[1]}};
  for (int i = 0; i < 4; ++i) a.q[i] = N == 1 ? vrev64q_f32(a.q[i]) : vextq_f32(a.q[i], a.q[i], 2);
  return a;
}

inline Floats load_first(const float* p, int n) {
  if (n == 16) return load(p);
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store_first(float* p, Floats a, int n) {
  if (n == 16) return store(p, a);
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

inline float half_to_float(uint16_t h) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}
inline uint16_t float_to_half(float f) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(f))), 0); }
inline Floats load_half(const uint16_t* p) {
  const uint16x8_t bits[2] = {vld1q_u16(p), vld1q_u16(p + 8)};
  const float16x8_t a = vreinterpretq_f16_u16(bits[0]), b = vreinterpretq_f16_u16(bits[1]);
  return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)}};
}
inline void store_half(uint16_t* p, Floats a) {
  for (int i = 0; i < 4; i += 2)
    vst1q_u16(p + 4 * i, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.q[i]), a.q[i + 1])));
}
inline Floats load_bfloat(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }

// A float table of up to 32 entries is looked up by its bytes: entry e's are 4 e .. 4 e + 3.
template <int IndexBits> inline float32x4_t lookup128(const float* table, int32x4_t index) {
  const uint32x4_t first = vreinterpretq_u32_s32(index);
  const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), first, vdupq_n_u32(0x04040404)));
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
  if constexpr (IndexBits == 1) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vcombine_u8(vld1_u8(bytes), vdup_n_u8(0)), at));
  } else {
    Table<IndexBits + 2> t = make_table<IndexBits + 2>(bytes);
    return vreinterpretq_f32_u8(lookup128<IndexBits + 2>(t, at));
  }
}
template <int IndexBits> inline Floats lookup(const float* table, Ints index) {
  Floats r;
  if constexpr (IndexBits <= 5) {
    for (int i = 0; i < 4; ++i) r.q[i] = lookup128<IndexBits>(table, index.q[i]);
  } else {
    int32_t at[16];
    float lanes[16];
    store_ints(at, index);
    for (int i = 0; i < 16; ++i) lanes[i] = table[at[i]];
    r = load(lanes);
  }
  return r;
}

inline void store_low_bytes(int8_t* p, Ints a) {  // even bytes of even bytes
  const int8x16_t front = vuzp1q_s8(vreinterpretq_s8_s32(a.q[0]), vreinterpretq_s8_s32(a.q[1]));
  const int8x16_t back = vuzp1q_s8(vreinterpretq_s8_s32(a.q[2]), vreinterpretq_s8_s32(a.q[3]));
  vst1q_s8(p, vuzp1q_s8(front, back));
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
