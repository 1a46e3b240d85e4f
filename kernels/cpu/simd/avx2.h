// The vector interface of scalar.h for AVX2 with FMA and F16C: every type is two 256-bit halves.
// Compile with -mavx2 -mfma -mf16c -ffp-contract=off (the compiler sees through these intrinsics, and would otherwise
// fuse a mul and an add that the interface rounds twice).
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLevelBias = 0;
// 16 registers: 4 x 1 accumulators are 8 of them; the weights, their magnitudes and the ones of dot4 take 5, x and the
// products the rest. Four rows share one weight load and one magnitude.
constexpr int kTileRows = 4, kTilePanels = 1;
constexpr int kTileQuads = 4;
// The hardware's prefetchers (Zen 1's) hide nothing of the memory from a loop with this much arithmetic.
constexpr int kPrefetchedBits = 8;

struct Bytes { __m256i lo, hi; };
struct Ints { __m256i lo, hi; };
struct Floats { __m256 lo, hi; };

// ---------------------------------------------------------------------------------------------------- bytes

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }

inline Bytes load_bytes(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline void store_bytes(uint8_t* p, Bytes a) { store256(p, a.lo), store256(p + 32, a.hi); }

template <int N> inline Bytes shift(Bytes a) {  // by 16-bit lanes: what crosses is the caller's to ignore
  if constexpr (N > 0) return {_mm256_srli_epi16(a.lo, N), _mm256_srli_epi16(a.hi, N)};
  else if constexpr (N < 0) return {_mm256_slli_epi16(a.lo, -N), _mm256_slli_epi16(a.hi, -N)};
  else return a;
}

inline Bytes and_bits(Bytes a, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(char(mask));
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}

inline Bytes xor_bits(Bytes a, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(char(mask));
  return {_mm256_xor_si256(a.lo, m), _mm256_xor_si256(a.hi, m)};
}

inline __m256i select256(__m256i m, __m256i a, __m256i b) {
  return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
}
inline Bytes select_bits(uint8_t mask, Bytes a, Bytes b) {
  const __m256i m = _mm256_set1_epi8(char(mask));
  return {select256(m, a.lo, b.lo), select256(m, a.hi, b.hi)};
}

// Table lookups beyond 16 entries. vpshufb looks at bits 0..3 of an index and gives 0 where bit 7 is set, so with T_j
// the j-th 16 entries, index - 16 j (signed, saturating) answers from part j where index >= 16 j and 0 elsewhere, and
//   T_0[i] ^ (T_0 ^ T_1)[i - 16] ^ (T_1 ^ T_2)[i - 32] ^ ..
// leaves exactly T_j[i mod 16] for an index in part j. That is 3 cheap instructions a part; a tree of vpblendvb has
// fewer, but each is 2 to 3 micro-operations on Intel. Parts 8..15 (index bit 7 set) start a second chain.
template <int IndexBits> struct Table { __m256i part[IndexBits > 4 ? 1 << (IndexBits - 4) : 1]; };

template <int IndexBits> inline Table<IndexBits> make_table(const uint8_t* entries) {
  static_assert(IndexBits >= 4 && IndexBits <= 8);
  Table<IndexBits> t;
  for (int j = 0; j < 1 << (IndexBits - 4); ++j) {
    __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * j));
    if (j % 8) part = _mm_xor_si128(part, _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * j - 16)));
    t.part[j] = _mm256_broadcastsi128_si256(part);
  }
  return t;
}

template <int Parts> inline __m256i lookup_chain(const __m256i* part, __m256i index) {
  const __m256i sixteen = _mm256_set1_epi8(16);
  __m256i r = _mm256_shuffle_epi8(part[0], index);
#pragma GCC unroll 8
  for (int j = 1; j < Parts; ++j) {
    index = _mm256_subs_epi8(index, sixteen);
    r = _mm256_xor_si256(r, _mm256_shuffle_epi8(part[j], index));
  }
  return r;
}

template <int IndexBits> inline __m256i lookup256(const Table<IndexBits>& t, __m256i index) {
  if constexpr (IndexBits == 8) {
    const __m256i other = _mm256_xor_si256(index, _mm256_set1_epi8(char(0x80)));
    return _mm256_xor_si256(lookup_chain<8>(t.part, index), lookup_chain<8>(t.part + 8, other));
  } else {
    return lookup_chain<1 << (IndexBits - 4)>(t.part, _mm256_and_si256(index, _mm256_set1_epi8((1 << IndexBits) - 1)));
  }
}
template <int IndexBits> inline Bytes lookup(const Table<IndexBits>& t, Bytes index) {
  return {lookup256<IndexBits>(t, index.lo), lookup256<IndexBits>(t, index.hi)};
}

// ---------------------------------------------------------------------------------------------------- integers

inline Ints broadcast(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Ints load_ints(const int32_t* p) { return {load256(p), load256(p + 8)}; }
inline void store_ints(int32_t* p, Ints a) { store256(p, a.lo), store256(p + 8, a.hi); }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Ints and_bits(Ints a, int32_t mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline Ints or_bits(Ints a, Ints b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int N> inline Ints shift_right(Ints a) { return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)}; }
template <int N> inline Ints shift_left(Ints a) { return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)}; }
inline Ints load_u8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(v, v))};
}
inline Ints load_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Ints load_i8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(v, v))};
}
inline Ints multiply(Ints a, int32_t factor) {
  const __m256i f = _mm256_set1_epi32(factor);
  return {_mm256_mullo_epi32(a.lo, f), _mm256_mullo_epi32(a.hi, f)};
}
inline Ints previous_lane(Ints a) {  // each half moved on by one lane, its first from the other half
  const __m256i on = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
  const __m256i lo = _mm256_permutevar8x32_epi32(a.lo, on), hi = _mm256_permutevar8x32_epi32(a.hi, on);
  return {_mm256_blend_epi32(lo, hi, 1), _mm256_blend_epi32(hi, lo, 1)};
}
inline Ints as_ints(Bytes a) { return {a.lo, a.hi}; }
inline Bytes as_bytes(Ints a) { return {a.lo, a.hi}; }

// AVX2 multiplies unsigned by signed bytes: |w| times x with w's sign is the same product, and two of them, at most
// 2 * 127 * 127, stay below the 32767 where vpmaddubsw saturates.
inline __m256i dot256(__m256i sum, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  const __m256i v = _mm256_set1_epi32(four);
  return {dot256(sum.lo, w.lo, v), dot256(sum.hi, w.hi, v)};
}

// Codes are unsigned as they are, and small: no signs to move, and sums of pairs of columns stay in 16 bits.
constexpr bool kPairs = true;
struct Pairs { __m256i lo, hi; };
inline Pairs no_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Pairs dot4(Pairs sum, Bytes codes, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  const __m256i v = _mm256_set1_epi32(four);
  return {_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(codes.lo, v)),
          _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(codes.hi, v))};
}
inline Ints add(Ints sum, Pairs pairs) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(pairs.lo, one)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(pairs.hi, one))};
}

// ---------------------------------------------------------------------------------------------------- words

struct Words { __m256i lo, hi; };

inline Words load_words(const uint16_t* p) { return {load256(p), load256(p + 16)}; }
inline void store_words(uint16_t* p, Words a) { store256(p, a.lo), store256(p + 16, a.hi); }
inline Words broadcast_word(uint16_t v) { return {_mm256_set1_epi16(short(v)), _mm256_set1_epi16(short(v))}; }
inline Words add_saturated(Words a, Words b) { return {_mm256_adds_epu16(a.lo, b.lo), _mm256_adds_epu16(a.hi, b.hi)}; }
inline Words sub_saturated(Words a, Words b) { return {_mm256_subs_epu16(a.lo, b.lo), _mm256_subs_epu16(a.hi, b.hi)}; }
inline Words min(Words a, Words b) { return {_mm256_min_epu16(a.lo, b.lo), _mm256_min_epu16(a.hi, b.hi)}; }
inline Words distance(Words a, Words b) {
  return {_mm256_abs_epi16(_mm256_subs_epi16(a.lo, b.lo)), _mm256_abs_epi16(_mm256_subs_epi16(a.hi, b.hi))};
}
inline Words add_signed(Words a, Words b) { return {_mm256_adds_epi16(a.lo, b.lo), _mm256_adds_epi16(a.hi, b.hi)}; }
inline Words sub_signed(Words a, Words b) { return {_mm256_subs_epi16(a.lo, b.lo), _mm256_subs_epi16(a.hi, b.hi)}; }
inline Words magnitude(Words a) { return {_mm256_abs_epi16(a.lo), _mm256_abs_epi16(a.hi)}; }
inline Words multiply_rounded(Words a, Words b) {
  return {_mm256_mulhrs_epi16(a.lo, b.lo), _mm256_mulhrs_epi16(a.hi, b.hi)};
}
inline Words high_square(Words a) { return {_mm256_mulhi_epu16(a.lo, a.lo), _mm256_mulhi_epu16(a.hi, a.hi)}; }
template <int Shift> inline Words spread(const uint16_t* p) {
  if constexpr (Shift >= 5) return broadcast_word(*p);
  if constexpr (Shift <= 1) {
    alignas(32) uint16_t lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = p[i >> Shift];
    return load_words(lanes);
  }
  // Up to eight numbers, in both halves of both registers; a byte shuffle picks lane i's bytes 2 (i >> Shift) and next.
  alignas(32) static constexpr struct Lanes {
    uint8_t at[64];
    constexpr Lanes() : at() { for (int i = 0; i < 64; ++i) at[i] = uint8_t(2 * (i / 2 >> Shift) + i % 2); }
  } lanes;
  const __m256i few = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_shuffle_epi8(few, load256(lanes.at)), _mm256_shuffle_epi8(few, load256(lanes.at + 32))};
}
inline Words and_words(Words a, Words b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline Words multiply(Words a, uint16_t factor) {
  const __m256i f = _mm256_set1_epi16(short(factor));
  return {_mm256_mullo_epi16(a.lo, f), _mm256_mullo_epi16(a.hi, f)};
}
template <int N> inline Words funnel(Words high, Words low) {
  if constexpr (N == 16) return low;
  return {_mm256_or_si256(_mm256_slli_epi16(high.lo, N), _mm256_srli_epi16(low.lo, 16 - N)),
          _mm256_or_si256(_mm256_slli_epi16(high.hi, N), _mm256_srli_epi16(low.hi, 16 - N))};
}
inline Words as_words(Ints a) { return {a.lo, a.hi}; }
inline Bytes as_bytes(Words a) { return {a.lo, a.hi}; }
struct Least { Words value, which; };
struct LeastWith { Words value, which, with; };
inline void keep_less(Least& least, Words value, int which) {  // where the old one is the minimum, it stays
  const Words next = min(least.value, value);
  const __m256i w = _mm256_set1_epi16(short(which));
  least.which.lo = _mm256_blendv_epi8(w, least.which.lo, _mm256_cmpeq_epi16(next.lo, least.value.lo));
  least.which.hi = _mm256_blendv_epi8(w, least.which.hi, _mm256_cmpeq_epi16(next.hi, least.value.hi));
  least.value = next;
}
inline void keep_less(LeastWith& least, Words value, int which, Words with) {
  const Words next = min(least.value, value);
  const __m256i w = _mm256_set1_epi16(short(which));
  const __m256i lo = _mm256_cmpeq_epi16(next.lo, least.value.lo), hi = _mm256_cmpeq_epi16(next.hi, least.value.hi);
  least.which = {_mm256_blendv_epi8(w, least.which.lo, lo), _mm256_blendv_epi8(w, least.which.hi, hi)};
  least.with = {_mm256_blendv_epi8(with.lo, least.with.lo, lo), _mm256_blendv_epi8(with.hi, least.with.hi, hi)};
  least.value = next;
}
template <int Shift, int Choices> inline Words pick(const uint16_t* p, int64_t stride, Words which) {
  Words found = spread<Shift>(p);
  for (int j = 1; j < Choices; ++j) {
    const Words a = spread<Shift>(p + j * stride);
    const __m256i w = _mm256_set1_epi16(short(j));
    found = {_mm256_blendv_epi8(found.lo, a.lo, _mm256_cmpeq_epi16(which.lo, w)),
             _mm256_blendv_epi8(found.hi, a.hi, _mm256_cmpeq_epi16(which.hi, w))};
  }
  return found;
}
inline void store_low_bytes(uint8_t* p, Words a) {  // packing works within 128-bit lanes: quarters 0 2 1 3
  const __m256i byte = _mm256_set1_epi16(0xff);
  const __m256i packed = _mm256_packus_epi16(_mm256_and_si256(a.lo, byte), _mm256_and_si256(a.hi, byte));
  store256(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline uint16_t reduce_min(Words a) {
  const __m256i half = _mm256_min_epu16(a.lo, a.hi);
  const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return uint16_t(_mm_cvtsi128_si32(_mm_minpos_epu16(eight)));
}

// ---------------------------------------------------------------------------------------------------- floats

constexpr bool kHasBf16 = false;

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// vmaxps and vminps are "a > b ? a : b" and "a < b ? a : b", also for NaN and for zeros of both signs.
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Floats to_float(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Ints round_to_int(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline Ints bits_of(Floats a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline Floats from_bits(Ints a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

inline float reduce_add(Floats a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Floats a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

template <int N> inline Floats swap_lanes(Floats a) {
  if constexpr (N == 1) return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
  if constexpr (N == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
  if constexpr (N == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  return {a.hi, a.lo};
}

// All ones in the lanes first .. first + 7 that are below n.
inline __m256i lanes_below(int n, int first) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n, 0)), _mm256_maskload_ps(p + 8, lanes_below(n, 8))};
}
inline void store_first(float* p, Floats a, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0), a.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(n, 8), a.hi);
}

inline float half_to_float(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline uint16_t float_to_half(float f) {
  return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT)));
}
inline Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_half(uint16_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats load_bfloat(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }

// Up to 16 entries stay in registers; a larger table is gathered.
template <int IndexBits> inline __m256 lookup256(const float* table, __m256i index) {
  if constexpr (IndexBits == 1) {
    const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table));
    return _mm256_permutevar_ps(_mm256_castsi256_ps(_mm256_broadcastq_epi64(pair)), index);
  } else if constexpr (IndexBits == 2) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)), index);
  } else if constexpr (IndexBits == 3) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  } else if constexpr (IndexBits == 4) {  // the permutes look at the three low bits, the blend at the sign
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  } else {
    return _mm256_i32gather_ps(table, index, 4);
  }
}
template <int IndexBits> inline Floats lookup(const float* table, Ints index) {
  return {lookup256<IndexBits>(table, index.lo), lookup256<IndexBits>(table, index.hi)};
}

inline void store_low_bytes(int8_t* p, Ints a) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  // Packing works within 128-bit lanes: dwords 0, 1 hold lanes 0..3 and 8..11, dwords 4, 5 lanes 4..7 and 12..15.
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, byte), _mm256_and_si256(a.hi, byte));
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i r = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), r);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_second(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
