// 16 x 16 floats, rows to columns. What an instruction set does it with makes no difference to the numbers.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

// from: 16 rows one after another; to: 16 rows, `stride` floats apart.
inline void transpose_16(const float* from, float* to, int64_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + 16 * i);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then fours: columns 4 l + j of lane l
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d low[2] = {_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])};
    const __m512d high[2] = {_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])};
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
  }
  for (int j = 0; j < 4; ++j) {  // lanes of four such rows
    const __m512 even01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (4 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (8 + j) * stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}

#elif defined(__AVX2__)

inline void transpose_8(const float* from, float* to, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + 16 * i);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

inline void transpose_16(const float* from, float* to, int64_t stride) {
  transpose_8(from, to, stride);
  transpose_8(from + 8, to + 8 * stride, stride);
  transpose_8(from + 8 * 16, to + 8, stride);
  transpose_8(from + 8 * 16 + 8, to + 8 * stride + 8, stride);
}

#else

inline void transpose_16(const float* from, float* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) to[column * stride + row] = from[row * 16 + column];
}

#endif

}  // namespace
