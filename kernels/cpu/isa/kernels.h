// The kernels of one instruction set, as a table of functions. Every set has all of them: the same source
// (kernels_body.h) compiled with other flags over another simd/*.h.
#pragma once

#include <cstdint>

#include "attention/attention_kernels.h"
#include "codecs/matrix.h"
#include "program/recurrence.h"
#include "rounding/descent.h"
#include "rounding/nested_descent.h"
#include "rounding/rounding.h"
#include "rounding/trellis.h"

namespace kbit {

enum class Compute : std::uint8_t { int8, bf16, fp32 };
enum class Activation : std::uint8_t { none, silu, gelu, gelu_tanh, relu, sigmoid, elu };

// Rows of x as a matmul reads them. All pointers are to row 0 of the pass.
struct MatmulInput {
  const float* x;               // (rows, K), the columns up to the next multiple of 64 are zero
  std::int64_t x_stride;        // floats
  const std::int8_t* codes;     // int8 compute: (rows, K padded to 64)
  std::int64_t codes_stride;    // bytes
  const float* scales;          // (rows, segments): x is codes * scale
  const std::int32_t* sums;     // (rows, segments): sum of a segment's codes
  std::int64_t segments_stride; // values
};

// out[row][16 * (panel - panel_begin) ..] = x W^T for some rows and panels.
struct MatmulTask {
  const Matrix* w;
  MatmulInput x;
  std::int64_t row_begin, row_end, panel_begin, panel_end;
  float* out;               // of row_begin and panel_begin
  std::int64_t out_stride;  // floats
  std::uint8_t* scratch;    // kMatmulScratch + kTrellisScratch bytes, 64-byte aligned, of this thread's own
};

// out[row] = x W for some rows, panels and tiles of columns: the rows of W are what is summed over here.
struct BackwardTask {
  const Matrix* w;
  const float* x;           // (rows, 16 * panels), of panel_begin
  std::int64_t x_stride;    // floats
  std::int64_t rows, panel_begin, panel_end, tile_begin, tile_end;
  float* out;               // (rows, K)
  std::int64_t out_stride;  // floats
  std::uint8_t* scratch;    // as of a MatmulTask
};
// Most panels of one, so that a tile of each fits the scratch memory.
constexpr std::int64_t kBackwardPanels = 64;

constexpr std::int64_t kMatmulScratch = 256 << 10;
// More of it, for rows of x as trellises are multiplied with them.
constexpr std::int64_t kTrellisScratch = 128 << 10;
// Up to so many rows of x, the int8 kernels of every set leave it alone.
constexpr int kRowsWithoutScratch = 4;

struct Kernels {
  const char* name;

  void (*matmul_int8)(const MatmulTask&);
  void (*matmul_bf16)(const MatmulTask&);  // null where the set has no bf16 dot product: compute bf16 is refused there
  void (*matmul_fp32)(const MatmulTask&);
  void (*matmul_trellis)(const MatmulTask&);  // matmul_int8 of trellises
  void (*matmul_backward)(const BackwardTask&);

  // One row of x (K) to int8, by segments: codes (padded with zeros to a multiple of 64), scales, sums of codes.
  void (*quantize_row)(const float* x, std::int64_t columns, int segment, std::int8_t* codes, float* scales,
                       std::int32_t* sums);
  // One row of x (K), its columns rotated as a matrix's are; out is padded with zeros to a multiple of 64.
  void (*rotate_row)(const Matrix& w, const float* x, float* out);
  // One row of x rounded to bfloat16.
  void (*bfloat_row)(const float* x, std::int64_t columns, std::uint16_t* out);
  // out = weight * x / sqrt(mean(x^2) + eps); out is padded with zeros to a multiple of 64.
  void (*rms_norm)(const float* x, const float* weight, std::int64_t columns, float eps, float* out);
  void (*add)(const float* x, float* out, std::int64_t count);                                // out += x
  void (*activate)(const float* gate, const float* up, float* out, std::int64_t count, Activation kind);  // up may be null
  void (*soft_cap)(float* x, std::int64_t count, float cap);                                  // x = cap tanh(x / cap)
  void (*decode_row)(const Matrix& w, std::int64_t row, float* out);                          // out (K)

  void (*gated_delta)(const RecurrenceTask&);
  void (*state_space)(const RecurrenceTask&);

  AttentionKernels attention;
  void (*round_rows)(const RoundTask&);      // up to 16 rows of weights to codes and scales
  void (*descend_rows)(const DescentTask&);  // better codes and scales for up to 16 rows
  void (*descend_nested_rows)(const NestedDescentTask&);  // better nested codes for up to 16 rows
  void (*trellis_search)(const TrellisTask&);  // the best string of a tile
  // The largest numbers of a row by blocks of 256 and 16ths of these; e^x of it, and sums. See sampling/sampling_kernel.h.
  bool (*block_maxima)(const float* x, std::int64_t count, float* lanes, float* maxima);
  void (*block_weights)(const float* x, std::int64_t count, float best, float factor, float* weights, float* sums,
                        float* lanes, float* maxima);
  std::int64_t (*trace)(const std::uint8_t* in, std::int64_t in_bytes, std::uint8_t* out, std::int64_t out_bytes);
};

// What a set with matrix tiles has of its own: the rest are the kernels of the set it extends.
struct TileProducts {
  void (*matmul_int8)(const MatmulTask&);
  void (*matmul_bf16)(const MatmulTask&);
};

}  // namespace kbit
