// Products with matrices of every kind of code: planes, nested, trellises, dense.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "codecs/matrix_storage.h"
#include "kernels_test_common.h"
#include "program/threads.h"

namespace {

struct Format {
  int bits;
  bool whole_steps;  // a codebook of whole steps, or one that needs two digits from 6 bits on
  std::int64_t block;
  bool offsets;
  Number scale_kind;
  bool nested = false;  // planes of 2 bits, then of 1 for each further bit, kept apart
};

std::uint16_t half_bits(float value) {  // of a power of two times 1.0 .. 1.99, 10 bits of fraction at most
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

std::vector<std::uint8_t> random_numbers(std::int64_t count, Number kind, std::uint64_t seed) {
  const std::vector<float> values = random_floats(count, seed, 0.25f);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(count * bytes_of(kind)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float value = std::copysign(std::fabs(values[i]) + 0.01f, values[i]);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const auto upper = static_cast<std::uint16_t>(bits >> 16);
    const std::uint16_t half = half_bits(value);
    if (kind == Number::single) std::memcpy(&out[4 * i], &value, 4);
    if (kind == Number::bfloat) std::memcpy(&out[2 * i], &upper, 2);
    if (kind == Number::half) std::memcpy(&out[2 * i], &half, 2);
  }
  return out;
}

std::shared_ptr<MatrixStorage> random_matrix(const Format& f, std::int64_t rows, std::int64_t columns, Team& team) {
  const auto seed = static_cast<std::uint64_t>(f.bits + 10 * rows + 1000 * columns);
  Random random(seed);
  std::vector<float> codebook(std::size_t{1} << f.bits);
  const float middle = static_cast<float>(codebook.size() / 2);
  for (std::size_t c = 0; c < codebook.size(); ++c) {
    codebook[c] = (static_cast<float>(c) - middle) / (middle > 1 ? middle - 1 : 1);
    if (!f.whole_steps) codebook[c] += 0.3f / middle * random.uniform();
  }
  std::vector<std::vector<std::uint8_t>> planes;
  QuantizedParts parts{};
  std::vector<int> widths;
  if (f.nested) widths.assign(static_cast<std::size_t>(f.bits - 1), 1), widths[0] = 2;
  for (int width = 8; !f.nested && width > 0; width /= 2)
    if (f.bits & width) widths.push_back(width);
  for (const int width : widths) {
    planes.emplace_back(static_cast<std::size_t>(rows * ((columns * width + 7) / 8)));
    for (std::uint8_t& byte : planes.back()) byte = static_cast<std::uint8_t>(random.next() >> 33);
  }
  for (const auto& plane : planes) parts.planes.push_back(plane.data());
  const std::int64_t blocks = f.block ? (columns + f.block - 1) / f.block : 1;
  const std::vector<std::uint8_t> scales = random_numbers(rows * blocks, f.scale_kind, seed + 1);
  const std::vector<std::uint8_t> offsets = random_numbers(rows * blocks, f.scale_kind, seed + 2);
  parts.rows = rows;
  parts.columns = columns;
  parts.bits = f.bits;
  parts.block_size = f.block;
  parts.scales = scales.data();
  parts.offsets = f.offsets ? offsets.data() : nullptr;
  parts.scale_kind = f.scale_kind;
  parts.codebook = codebook.data();
  parts.apart = f.nested;
  return MatrixStorage::quantized(parts, team);
}

struct TrellisKind {
  int bits;
  bool half;  // and half a bit more
  int window;
  Code code = Code::sum4;
};

std::shared_ptr<MatrixStorage> random_trellis(const TrellisKind& kind, std::int64_t rows, std::int64_t columns,
                                              Team& team) {
  const auto seed = static_cast<std::uint64_t>(kind.bits + 10 * rows + 1000 * columns);
  const std::int64_t row_tiles = (rows + 15) / 16, column_tiles = (columns + 15) / 16;
  Random random(seed);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(row_tiles * column_tiles * trellis_bytes(kind.bits, kind.half)));
  std::vector<std::uint8_t> signs(static_cast<std::size_t>(2 * column_tiles));
  for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random.next() >> 33);
  for (std::uint8_t& byte : signs) byte = static_cast<std::uint8_t>(random.next() >> 33);
  const std::vector<std::uint8_t> scales = random_numbers(rows, Number::half, seed + 1);
  std::vector<std::uint16_t> halves(static_cast<std::size_t>(rows));
  std::memcpy(halves.data(), scales.data(), scales.size());
  std::int64_t mixed = 16;  // the largest power of two that divides all columns
  while (16 * column_tiles % (2 * mixed) == 0 && mixed < 512) mixed *= 2;
  return MatrixStorage::trellis({rows, columns, kind.bits, kind.code, kind.window, codes.data(), halves.data(), mixed,
                                 signs.data(), kind.half}, team);
}

std::int64_t padded(std::int64_t columns) { return (columns + 63) / 64 * 64; }

// x (rows, K) in the forms that matmuls read.
struct Inputs {
  std::vector<float> x;
  AlignedBytes codes, bfloats;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
  MatmulInput int8{}, bf16{};

  Inputs(std::int64_t rows, std::int64_t columns, int segment, Digest& digest)
      : codes(static_cast<std::size_t>(rows * padded(columns))),
        bfloats(static_cast<std::size_t>(rows * padded(columns)) * 2) {
    const std::int64_t width = padded(columns), segments = width / segment;
    x.assign(static_cast<std::size_t>(rows * width), 0.0f);
    scales.resize(static_cast<std::size_t>(rows * segments));
    sums.resize(static_cast<std::size_t>(rows * segments));
    for (std::int64_t r = 0; r < rows; ++r) {
      std::vector<float> row = random_floats(columns, static_cast<std::uint64_t>(7 * r + columns), 3.0f);
      row[static_cast<std::size_t>(r % columns)] *= 30.0f;
      if (r == 1) std::fill(row.begin(), row.begin() + std::min<std::ptrdiff_t>(columns, 64), 0.0f);
      std::copy(row.begin(), row.end(), x.begin() + static_cast<std::ptrdiff_t>(r * width));
      Comparison codes_equal("quantize_row", &digest), scales_equal("quantize_row's scales", &digest);
      Comparison sums_equal("quantize_row's sums", &digest), bfloats_equal("bfloat_row", &digest);
      float* row_scales = scales.data() + r * segments;
      std::int32_t* row_sums = sums.data() + r * segments;
      for (const Kernels* set : all_sets) {
        auto* row_codes = reinterpret_cast<std::int8_t*>(codes.data()) + r * width;
        auto* row_bfloats = reinterpret_cast<std::uint16_t*>(bfloats.data()) + r * width;
        set->quantize_row(x.data() + r * width, columns, segment, row_codes, row_scales, row_sums);
        set->bfloat_row(x.data() + r * width, width, row_bfloats);
        codes_equal.add(*set, row_codes, static_cast<std::size_t>(width));
        scales_equal.add(*set, row_scales, static_cast<std::size_t>(segments) * 4);
        sums_equal.add(*set, row_sums, static_cast<std::size_t>(segments) * 4);
        bfloats_equal.add(*set, row_bfloats, static_cast<std::size_t>(width) * 2);
      }
    }
    int8 = {x.data(), width, reinterpret_cast<std::int8_t*>(codes.data()), width, scales.data(), sums.data(), segments};
    bf16 = int8;
    bf16.codes = reinterpret_cast<std::int8_t*>(bfloats.data());
    bf16.codes_stride = 2 * width;
  }
};

// Rows [row_begin, row_end) of x times all panels from panel_begin on, with a margin that is to stay as it was.
std::vector<float> multiply(void (*kernel)(const MatmulTask&), const Matrix& w, const MatmulInput& x,
                            std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin) {
  static const AlignedBytes scratch(static_cast<std::size_t>(kMatmulScratch + kTrellisScratch));
  const std::int64_t width = (w.panels - panel_begin) * 16, stride = width + 5;
  std::vector<float> out(static_cast<std::size_t>((row_end - row_begin) * stride + 16), -7.0f);
  std::memset(scratch.data(), 0xab, scratch.size());
  kernel({&w, x, row_begin, row_end, panel_begin, w.panels, out.data(), stride, scratch.data()});
  return out;
}

bool is_amx(const Kernels& set) { return std::strncmp(set.name, "amx", 3) == 0; }

void test_matmuls(const Matrix& w, const std::string& what, Digest& digest) {
  for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{7}, std::int64_t{40}, std::int64_t{55}}) {
    if (quick && rows == 55) continue;
    const Inputs inputs(rows, w.columns, w.bits ? w.segment : 64, digest);
    const std::string name = what + ", " + std::to_string(rows) + " rows";
    Comparison int8(name + ", int8", &digest), fp32(name + ", fp32", &digest);
    Comparison part(name + ", part of int8", &digest);
    Comparison bf16(name + ", bf16", nullptr), bf16_part(name + ", part of bf16", nullptr);
    const std::int64_t from = rows / 3, panel = w.panels / 2;
    for (const Kernels* set : all_sets) {
      if (w.bits) {
        const auto kernel = w.code == Code::planes ? set->matmul_int8 : set->matmul_trellis;
        int8.add(*set, multiply(kernel, w, inputs.int8, 0, rows, 0));
        part.add(*set, multiply(kernel, w, inputs.int8, from, rows, panel));
      }
      fp32.add(*set, multiply(set->matmul_fp32, w, inputs.int8, 0, rows, 0));
      if (!is_amx(*set)) continue;  // sets without tiles sum bf16 products in another order
      bf16.add(*set, multiply(set->matmul_bf16, w, inputs.bf16, 0, rows, 0));
      bf16_part.add(*set, multiply(set->matmul_bf16, w, inputs.bf16, from, rows, panel));
    }
  }
}

void test_matrix(const Format& f, std::int64_t rows, std::int64_t columns, Team& team, Digest& digest) {
  const auto storage = random_matrix(f, rows, columns, team);
  const std::string what = std::to_string(f.bits) + (f.whole_steps ? " bits, whole steps" : " bits, irregular") +
                           ", block " + std::to_string(f.block) + (f.offsets ? ", offsets, " : ", ") +
                           (f.nested ? "nested, " : "") + std::to_string(rows) + " x " + std::to_string(columns);
  test_matmuls(storage->matrix(), what, digest);
  Comparison decoded(what + ", decode_row", &digest);
  for (const Kernels* set : all_sets) {
    std::vector<float> out(static_cast<std::size_t>(rows * columns));
    for (std::int64_t r = 0; r < rows; ++r) set->decode_row(storage->matrix(), r, out.data() + r * columns);
    decoded.add(*set, out);
  }
}

void test_trellis(const TrellisKind& kind, std::int64_t rows, std::int64_t columns, Team& team, Digest& digest) {
  const auto storage = random_trellis(kind, rows, columns, team);
  const std::string what = "trellis of " + std::to_string(kind.bits) + (kind.half ? " and a half" : "") +
                           (kind.code == Code::sum2 ? ", sum2, " : ", sum4, ") + std::to_string(kind.window) +
                           " bits a window, " + std::to_string(rows) + " x " + std::to_string(columns);
  test_matmuls(storage->matrix(), what, digest);
  Comparison rotated(what + ", rotate_row", &digest);
  std::vector<float> x = random_floats(columns, 5, 3.0f);
  x.resize(static_cast<std::size_t>(padded(columns)));
  for (const Kernels* set : all_sets) {
    std::vector<float> out(x.size(), -7.0f);
    set->rotate_row(storage->matrix(), x.data(), out.data());
    rotated.add(*set, out);
  }
}

// The search for a tile's string: of normal numbers, nearly, in a code of random values.
void test_search(const TrellisKind& kind, Digest& digest) {
  const std::vector<float> values = random_floats(std::int64_t{1} << kind.window, 3, 1.7f);
  const TrellisCode code(kind.bits, kind.half, kind.window, values.data());
  std::vector<float> numbers = random_floats(kTrellisTile, 4);
  const std::vector<float> more = random_floats(kTrellisTile, 5);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] += more[i];
  // Upper triangular with ones on the diagonal, which nothing reads.
  std::vector<std::int16_t> columns(kTrellisTile);
  std::vector<std::int32_t> rows(kTrellisTile);
  for (std::size_t i = 0; i < columns.size(); ++i) {
    if (i % 16 <= i / 16) continue;
    columns[i] = static_cast<std::int16_t>(8192.0f * std::clamp(numbers[i], -3.0f, 3.0f));
    rows[i] = static_cast<std::int32_t>(16384.0f * more[i]);
  }
  const AlignedBytes scratch(static_cast<std::size_t>(trellis_scratch(code, true)));
  for (const TrellisFeedback& feedback : {TrellisFeedback{}, TrellisFeedback{columns.data(), rows.data()}}) {
    Comparison found("search of " + std::to_string(kind.bits) + (kind.half ? " and a half" : "") +
                         (feedback.columns ? ", errors passed on" : ""),
                     &digest);
    for (const Kernels* set : all_sets) {
      std::vector<std::uint8_t> string(static_cast<std::size_t>(trellis_bytes(kind.bits, kind.half)));
      set->trellis_search({&code, numbers.data(), string.data(), scratch.data(), feedback});
      found.add(*set, string);
    }
  }
}

void test_trellises(Team& team, Digest& digest) {
  for (int bits = 2; bits <= 6; ++bits) {
    for (const bool half : {false, true}) {
      if (bits == 6 && half) continue;
      if (quick && !half && bits != 3) continue;
      test_trellis({bits, half, 16}, 33, 200, team, digest);
      test_search({bits, half, bits == 6 ? 12 : bits + 8}, digest);
      if (quick) continue;
      test_trellis({bits, half, 12}, 50, 321, team, digest);
      test_trellis({bits, half, 16}, 16, 4200, team, digest);  // more columns than are repeated, or kept in digits, at once
    }
  }
  test_trellis({2, false, 16, Code::sum2}, 33, 200, team, digest);
  test_trellis({2, false, 16, Code::sum2}, 40, 704, team, digest);
}

void test_all_matmuls(Team& team, Digest& digest) {
  for (int bits = 2; bits <= 8; ++bits) {
    if (quick && bits != 3 && bits != 4 && bits != 8) continue;
    for (const bool whole_steps : {true, false}) {
      test_matrix({bits, whole_steps, 64, false, Number::half}, 33, 200, team, digest);
      if (quick) continue;
      test_matrix({bits, whole_steps, 64, true, Number::half}, 40, 704, team, digest);
      test_matrix({bits, whole_steps, 32, whole_steps, Number::bfloat}, 16, 100, team, digest);
      test_matrix({bits, whole_steps, 48, !whole_steps, Number::single}, 17, 150, team, digest);
      test_matrix({bits, whole_steps, 0, false, Number::single}, 50, 130, team, digest);
    }
  }
  for (int bits = 3; bits <= 8; ++bits) {
    if (quick && bits != 3 && bits != 7) continue;
    test_matrix({bits, false, 64, false, Number::half, true}, 33, 200, team, digest);
    if (!quick) test_matrix({bits, true, 0, false, Number::single, true}, 40, 704, team, digest);
  }
  test_matrix({4, false, 64, false, Number::half}, 35, 1100, team, digest);
  test_matrix({7, false, 64, true, Number::half}, 35, 1100, team, digest);
  for (const Number kind : {Number::half, Number::bfloat, Number::single}) {
    const std::vector<std::uint8_t> values = random_numbers(37 * 150, kind, 3);
    const auto storage = MatrixStorage::dense(values.data(), 37, 150, kind, team);
    test_matmuls(storage->matrix(), "dense " + std::to_string(bytes_of(kind)) + " bytes", digest);
  }
}

}  // namespace
