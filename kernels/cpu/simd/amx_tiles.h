// AMX tiles: eight registers of 16 rows x 64 bytes, and two multiplications.
//
//     A  16 rows of x             64 int8, or 32 bfloat16, to a row
//     B  one tile of weights      row q: columns 4q .. 4q+3 (bfloat16: 2q, 2q+1) of 16 rows of W, a quad of matrix.h
//     C  16 x 16 int32 or float   C[m][n] += sum over q and j of A[m][q, j] * B[q][n, j]
//
// Both factors are signed, so the int8 levels need no bias here (kLevelBias is vpdpbusd's).
//
// With KBIT_EMULATE_TILES the same names are plain C++ that follows the instructions' definition (Intel SDM, volume 2),
// so that the kernels are tested on machines without AMX.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int kTileRegisterRows = 16, kTileRegisterBytes = 64;

#if !defined(KBIT_EMULATE_TILES)

// Assembly instead of the intrinsics: GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads
// and its _tile_loadd of none, so stores to the others may be dropped or come after. Tile registers need no mention: no
// compiler uses them on its own.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Between these two the calling thread has the tiles. Released, they cost nothing at a context switch.
inline void tiles_begin() { asm volatile("ldtilecfg %0" : : "m"(kTileConfig)); }
inline void tiles_end() { asm volatile("tilerelease"); }

template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }

// Rows are `stride` bytes apart.
template <int T> inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}

// C += A B of int8 in int32, and of bfloat16 in float.
template <int C, int A, int B> inline void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct EmulatedTiles {
  bool configured;
  uint8_t at[8][kTileRegisterRows * kTileRegisterBytes];
};
thread_local EmulatedTiles emulated;

// Without a configuration the instructions fault.
inline uint8_t* tile_register(int t) {
  if (!emulated.configured) abort();
  return emulated.at[t];
}

inline void tiles_begin() {
  memset(&emulated, 0, sizeof emulated);
  emulated.configured = true;
}
inline void tiles_end() { emulated.configured = false; }

template <int T> inline void tile_zero() { memset(tile_register(T), 0, sizeof emulated.at[T]); }

template <int T> inline void tile_load(const void* p, int64_t stride) {
  uint8_t* to = tile_register(T);
  for (int row = 0; row < kTileRegisterRows; ++row)
    memcpy(to + row * kTileRegisterBytes, static_cast<const uint8_t*>(p) + row * stride, kTileRegisterBytes);
}
template <int T> inline void tile_store(void* p, int64_t stride) {
  const uint8_t* from = tile_register(T);
  for (int row = 0; row < kTileRegisterRows; ++row)
    memcpy(static_cast<uint8_t*>(p) + row * stride, from + row * kTileRegisterBytes, kTileRegisterBytes);
}

inline void emulate_dot_int8(uint8_t* c_tile, const uint8_t* a, const uint8_t* b) {
  for (int m = 0; m < 16; ++m, c_tile += 64, a += 64) {
    int32_t c[16];
    memcpy(c, c_tile, 64);
    for (int q = 0; q < 16; ++q)
      for (int n = 0; n < 16; ++n)
        for (int j = 0; j < 4; ++j) c[n] += int32_t(int8_t(a[4 * q + j])) * int8_t(b[64 * q + 4 * n + j]);
    memcpy(c_tile, c, 64);
  }
}

// Subnormal numbers count as zeros, read or made.
inline float flushed(float f) { return fabsf(f) < 1.17549435e-38f ? copysignf(0.0f, f) : f; }

inline float bfloat_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return flushed(f);
}

inline float fused(float a, float b, float c) { return flushed(fmaf(a, b, flushed(c))); }

// Even and odd columns are summed apart, from zero, and their sum is added to C.
inline void emulate_dot_bf16(uint8_t* c_tile, const uint8_t* a, const uint8_t* b) {
  for (int m = 0; m < 16; ++m, c_tile += 64, a += 64) {
    float c[16];
    memcpy(c, c_tile, 64);
    for (int n = 0; n < 16; ++n) {
      float even = 0.0f, odd = 0.0f;
      for (int q = 0; q < 16; ++q) {
        even = fused(bfloat_at(a + 4 * q), bfloat_at(b + 64 * q + 4 * n), even);
        odd = fused(bfloat_at(a + 4 * q + 2), bfloat_at(b + 64 * q + 4 * n + 2), odd);
      }
      c[n] = flushed(flushed(c[n]) + flushed(even + odd));
    }
    memcpy(c_tile, c, 64);
  }
}

template <int C, int A, int B> inline void tile_dot_int8() {
  emulate_dot_int8(tile_register(C), tile_register(A), tile_register(B));
}
template <int C, int A, int B> inline void tile_dot_bf16() {
  emulate_dot_bf16(tile_register(C), tile_register(A), tile_register(B));
}

#endif

}  // namespace
