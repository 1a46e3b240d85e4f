// The vector interface on AVX-512 with BW, DQ, VL and VNNI; with VBMI (byte permutes) and BF16 where the unit is compiled
// for them. See scalar.h for what each operation means.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

// vpdpbusd multiplies unsigned by signed bytes: weights carry +128, and the sums start at -128 * sum(x).
constexpr int kLevelBias = 128;
// 6 x 2 int sums and as many float sums take 24 of 32 registers; 12 dot products in flight cover their latency (4 or 5
// cycles, two pipes).
constexpr int kTileRows = 6, kTilePanels = 2;
// Two quads in a row: with one, GCC 12 copies all sums around each.
constexpr int kTileQuads = 2;
constexpr int kPrefetchedBits = 6;

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };

// ---------------------------------------------------------------------------------------------------- bytes

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_load_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_store_si512(p, a.v); }

template <int N> inline Bytes shift(Bytes a) {
  if constexpr (N > 0) return {_mm512_srli_epi16(a.v, N)};
  if constexpr (N < 0) return {_mm512_slli_epi16(a.v, -N)};
  return a;
}

inline Bytes select_bits(uint8_t mask, Bytes a, Bytes b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), a.v, b.v, 0xca)};  // mask ? a : b
}

inline Bytes and_bits(Bytes a, uint8_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(mask)))}; }

inline Bytes xor_bits(Bytes a, uint8_t mask) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(char(mask)))}; }

template <int IndexBits> struct Table { __m512i v[IndexBits <= 6 ? 1 : 1 << (IndexBits - 6)]; };

template <int IndexBits> inline Table<IndexBits> make_table(const uint8_t* entries) {
  Table<IndexBits> t;
  if constexpr (IndexBits == 4) {
    t.v[0] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  } else if constexpr (IndexBits == 5) {
    t.v[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)));
  } else {
    for (int i = 0; i < 1 << (IndexBits - 6); ++i) t.v[i] = _mm512_loadu_si512(entries + 64 * i);
  }
  return t;
}

#ifdef __AVX512VBMI__

// vpermb reads the low 6 bits of an index, so a table of 16 or 32 is repeated instead of masking the index.
template <int IndexBits> inline Bytes lookup(const Table<IndexBits>& t, Bytes index) {
  if constexpr (IndexBits <= 6) return {_mm512_permutexvar_epi8(index.v, t.v[0])};
  if constexpr (IndexBits == 7) return {_mm512_permutex2var_epi8(t.v[0], index.v, t.v[1])};
  if constexpr (IndexBits == 8) {
    const __m512i low = _mm512_permutex2var_epi8(t.v[0], index.v, t.v[1]);
    const __m512i high = _mm512_permutex2var_epi8(t.v[2], index.v, t.v[3]);
    return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(index.v), low, high)};
  }
}

#else

// Without byte permutes, a vector of 64 entries is four tables of 16, one of them broadcast at each use.
template <int IndexBits> inline Bytes lookup(const Table<IndexBits>& t, Bytes index) {
  const __m512i low = _mm512_and_si512(index.v, _mm512_set1_epi8(15));
  if constexpr (IndexBits == 4) return {_mm512_shuffle_epi8(t.v[0], low)};
  if constexpr (IndexBits == 5) {
    const __mmask64 upper = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(16));
    return {_mm512_mask_blend_epi8(upper, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(t.v[0], t.v[0], 0x00), low),
                                   _mm512_shuffle_epi8(_mm512_shuffle_i32x4(t.v[0], t.v[0], 0x55), low))};
  }
  if constexpr (IndexBits >= 6) {
    const __mmask64 bit4 = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(16));
    const __mmask64 bit5 = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(32));
    __m512i parts[1 << (IndexBits - 6)];
    for (int i = 0; i < 1 << (IndexBits - 6); ++i) {
      const __m512i v = t.v[i];
      const __m512i a = _mm512_mask_blend_epi8(bit4, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(v, v, 0x00), low),
                                               _mm512_shuffle_epi8(_mm512_shuffle_i32x4(v, v, 0x55), low));
      const __m512i b = _mm512_mask_blend_epi8(bit4, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(v, v, 0xaa), low),
                                               _mm512_shuffle_epi8(_mm512_shuffle_i32x4(v, v, 0xff), low));
      parts[i] = _mm512_mask_blend_epi8(bit5, a, b);
    }
    if constexpr (IndexBits == 6) return {parts[0]};
    const __mmask64 bit6 = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(64));
    if constexpr (IndexBits == 7) return {_mm512_mask_blend_epi8(bit6, parts[0], parts[1])};
    if constexpr (IndexBits == 8) {
      return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(index.v), _mm512_mask_blend_epi8(bit6, parts[0], parts[1]),
                                     _mm512_mask_blend_epi8(bit6, parts[2], parts[3]))};
    }
  }
}

#endif

// ---------------------------------------------------------------------------------------------------- integers

inline Ints broadcast(int32_t v) { return {_mm512_set1_epi32(v)}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints and_bits(Ints a, int32_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))}; }
inline Ints or_bits(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> inline Ints shift_right(Ints a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> inline Ints shift_left(Ints a) { return {_mm512_slli_epi32(a.v, N)}; }
inline Ints load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints load_u16(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints multiply(Ints a, int32_t factor) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(factor))}; }
inline Ints previous_lane(Ints a) { return {_mm512_alignr_epi32(a.v, a.v, 15)}; }
inline Ints as_ints(Bytes a) { return {a.v}; }
inline Bytes as_bytes(Ints a) { return {a.v}; }

inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
}

// vpdpbusd adds to 32 bits at no cost, and takes codes as they are.
constexpr bool kPairs = false;
struct Pairs { Ints sums; };
inline Pairs no_pairs() { return {broadcast(0)}; }
inline Pairs dot4(Pairs sum, Bytes codes, const int8_t* x) { return {dot4(sum.sums, codes, x)}; }
inline Ints add(Ints sum, Pairs pairs) { return add(sum, pairs.sums); }

// ---------------------------------------------------------------------------------------------------- words

struct Words { __m512i v; };

inline Words load_words(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_words(uint16_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
inline Words broadcast_word(uint16_t v) { return {_mm512_set1_epi16(short(v))}; }
inline Words add_saturated(Words a, Words b) { return {_mm512_adds_epu16(a.v, b.v)}; }
inline Words sub_saturated(Words a, Words b) { return {_mm512_subs_epu16(a.v, b.v)}; }
inline Words min(Words a, Words b) { return {_mm512_min_epu16(a.v, b.v)}; }
inline Words distance(Words a, Words b) { return {_mm512_abs_epi16(_mm512_subs_epi16(a.v, b.v))}; }
inline Words add_signed(Words a, Words b) { return {_mm512_adds_epi16(a.v, b.v)}; }
inline Words sub_signed(Words a, Words b) { return {_mm512_subs_epi16(a.v, b.v)}; }
inline Words magnitude(Words a) { return {_mm512_abs_epi16(a.v)}; }
inline Words multiply_rounded(Words a, Words b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
inline Words high_square(Words a) { return {_mm512_mulhi_epu16(a.v, a.v)}; }
template <int Shift> inline Words spread(const uint16_t* p) {
  alignas(64) static constexpr struct Lanes {
    uint16_t at[32];
    constexpr Lanes() : at() { for (int i = 0; i < 32; ++i) at[i] = uint16_t(i >> Shift); }
  } lanes;
  if constexpr (Shift >= 5) return {_mm512_set1_epi16(short(*p))};
  // Two to sixteen numbers, which lie in the first 32 bytes.
  const __m512i few = Shift >= 2 ? _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
                                 : _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_permutexvar_epi16(_mm512_load_si512(lanes.at), few)};
}
inline Words and_words(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Words multiply(Words a, uint16_t factor) { return {_mm512_mullo_epi16(a.v, _mm512_set1_epi16(short(factor)))}; }
template <int N> inline Words funnel(Words high, Words low) {
  if constexpr (N == 16) return low;
#ifdef __AVX512VBMI2__
  return {_mm512_shldi_epi16(high.v, low.v, N)};
#else
  return {_mm512_or_si512(_mm512_slli_epi16(high.v, N), _mm512_srli_epi16(low.v, 16 - N))};
#endif
}
inline Words as_words(Ints a) { return {a.v}; }
inline Bytes as_bytes(Words a) { return {a.v}; }
struct Least { Words value, which; };
struct LeastWith { Words value, which, with; };
inline void keep_less(Least& least, Words value, int which) {
  const __mmask32 less = _mm512_cmplt_epu16_mask(value.v, least.value.v);
  least.value.v = _mm512_min_epu16(value.v, least.value.v);
  least.which.v = _mm512_mask_mov_epi16(least.which.v, less, _mm512_set1_epi16(short(which)));
}
inline void keep_less(LeastWith& least, Words value, int which, Words with) {
  const __mmask32 less = _mm512_cmplt_epu16_mask(value.v, least.value.v);
  least.value.v = _mm512_min_epu16(value.v, least.value.v);
  least.which.v = _mm512_mask_mov_epi16(least.which.v, less, _mm512_set1_epi16(short(which)));
  least.with.v = _mm512_mask_mov_epi16(least.with.v, less, with.v);
}
// Each words of some choices one after the other, in 16 bytes.
template <int Each> inline __m128i joined(const uint16_t* p, int64_t stride) {
  const auto at = [&](int choice) { return reinterpret_cast<const __m128i*>(p + choice * stride); };
  if constexpr (Each == 8) return _mm_loadu_si128(at(0));
  if constexpr (Each == 4) return _mm_unpacklo_epi64(_mm_loadl_epi64(at(0)), _mm_loadl_epi64(at(1)));
  if constexpr (Each == 2) {
    const auto two = [&](int choice) {  // (not every GCC has _mm_loadu_si32)
      int32_t both;
      memcpy(&both, p + choice * stride, 4);
      return both;
    };
    return _mm_set_epi32(two(3), two(2), two(1), two(0));
  }
  return _mm_set_epi16(short(p[7 * stride]), short(p[6 * stride]), short(p[5 * stride]), short(p[4 * stride]),
                       short(p[3 * stride]), short(p[2 * stride]), short(p[stride]), short(p[0]));
}
template <int Shift, int Choices> inline Words pick(const uint16_t* p, int64_t stride, Words which) {
  constexpr int kEach = Shift >= 5 ? 1 : 32 >> Shift, kWords = kEach * Choices;
  static_assert(Shift >= 2 && kWords >= 16 && kWords <= 64);
  alignas(64) static constexpr struct Lanes {
    uint16_t at[32];
    constexpr Lanes() : at() { for (int i = 0; i < 32; ++i) at[i] = uint16_t(i >> Shift); }
  } lanes;
  const __m512i index = _mm512_add_epi16(_mm512_mullo_epi16(which.v, _mm512_set1_epi16(kEach)), _mm512_load_si512(lanes.at));
  const auto half = [&](int from) __attribute__((always_inline)) {  // 32 words of them, or 16
    const auto part = [&](int i) { return joined<kEach>(p + (from + i * 8 / kEach) * stride, stride); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
    if constexpr (kWords == 16) return _mm512_castsi256_si512(low);
    else return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi256_si512(low), part(2), 2), part(3), 3);
  };
  if constexpr (kWords <= 32) return {_mm512_permutexvar_epi16(index, half(0))};
  return {_mm512_permutex2var_epi16(half(0), index, half(32 / kEach))};
}
inline void store_low_bytes(uint8_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(a.v));
}
inline uint16_t reduce_min(Words a) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return uint16_t(_mm_cvtsi128_si32(_mm_minpos_epu16(eight)));
}

// ---------------------------------------------------------------------------------------------------- floats

#ifdef __AVX512BF16__
constexpr bool kHasBf16 = true;
inline Floats dot2(Floats sum, Bytes w, const uint16_t* x) {
  int32_t two;
  memcpy(&two, x, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(two))};
}
#else
constexpr bool kHasBf16 = false;
#endif

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float v) { return {_mm512_set1_ps(v)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints round_to_int(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Ints bits_of(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline Floats from_bits(Ints a) { return {_mm512_castsi512_ps(a.v)}; }

inline float reduce_add(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Floats a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

template <int N> inline Floats swap_lanes(Floats a) {
  if constexpr (N == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (N == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  return {_mm512_shuffle_f32x4(a.v, a.v, N == 4 ? 0xb1 : 0x4e)};
}

inline Floats load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}
inline void store_first(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }

inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline float half_to_float(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline uint16_t float_to_half(float f) {
  return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 0));
}
inline Floats load_bfloat(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }

template <int IndexBits> inline Floats lookup(const float* table, Ints index) {
  if constexpr (IndexBits <= 4) {
    const __m512 t = IndexBits == 4 ? _mm512_loadu_ps(table) : _mm512_maskz_loadu_ps((1u << (1 << IndexBits)) - 1, table);
    return {_mm512_permutexvar_ps(index.v, t)};
  } else if constexpr (IndexBits == 5) {
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), index.v, _mm512_loadu_ps(table + 16))};
  } else {
    return {_mm512_i32gather_ps(index.v, table, 4)};
  }
}

inline void store_low_bytes(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_second(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
