// Every kernel of some instruction sets against the scalar ones, byte for byte, on the same made-up inputs.
//
// For sets that the Python tests cannot run: Arm's under qemu (tools/arm/check.sh), AMX's machine code under a trap
// (tools/amx/check.sh). Compile with -DSETS='"scalar", "neon", ..' and link isa/kernel_table.cpp with those sets. Prints each
// difference and exits with 1, or prints a digest of the scalar results, which is the same on every machine.
//
// Usage: kernels_test [quick]      quick: a part of the widths and shapes
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention/attention_plan.h"
#include "isa/kernel_table.h"
#include "isa/kernels.h"
#include "attention/kv_pages.h"
#include "codecs/matrix_storage.h"
#include "program/threads.h"

namespace {

using namespace kbit;
using std::int64_t;

const std::vector<const Kernels*> all_sets = [] {
  std::vector<const Kernels*> sets;
  for (const char* name : {SETS}) {
    sets.push_back(find_kernels(name));
    if (!sets.back()) {
      std::fprintf(stderr, "%s is not linked\n", name);
      std::exit(2);
    }
  }
  return sets;
}();

bool quick = false;
int failures = 0, comparisons = 0;

// xorshift64* (Vigna 2016).
struct Random {
  std::uint64_t state;
  explicit Random(std::uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du;
  }
  float uniform() { return static_cast<float>(static_cast<std::int64_t>(next()) >> 40) * 0x1p-23f; }  // [-1, 1)
};

std::vector<float> random_floats(std::int64_t count, std::uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = random.uniform() * scale;
  return values;
}

// FNV-1a.
struct Digest {
  std::uint64_t value = 0xcbf29ce484222325u;
  void add(const void* data, std::size_t bytes) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    for (std::size_t i = 0; i < bytes; ++i) value = (value ^ from[i]) * 0x100000001b3u;
  }
};

// Collects what each set makes of one input and compares it with the first set's.
class Comparison {
 public:
  Comparison(std::string what, Digest* digest) : what_(std::move(what)), digest_(digest) {}

  template <typename T> void add(const Kernels& set, const std::vector<T>& result) {
    add(set, result.data(), result.size() * sizeof(T));
  }
  void add(const Kernels& set, const void* data, std::size_t bytes) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    if (first_.empty()) {
      first_.assign(from, from + bytes);
      if (digest_) digest_->add(data, bytes);
      return;
    }
    ++comparisons;
    if (bytes == first_.size() && std::memcmp(from, first_.data(), bytes) == 0) return;
    std::size_t at = 0;
    while (at < bytes && at < first_.size() && from[at] == first_[at]) ++at;
    std::printf("%s: %s differs from byte %zu of %zu on\n", what_.c_str(), set.name, at, first_.size());
    ++failures;
  }

 private:
  std::string what_;
  Digest* digest_;
  std::vector<std::uint8_t> first_;
};

// ------------------------------------------------------------------------------------------------------- matmul

struct Format {
  int bits;
  bool whole_steps;  // a codebook of whole steps, or one that needs two digits from 6 bits on
  std::int64_t block;
  bool offsets;
  Number scale_kind;
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
  for (int width = 8; width > 0; width /= 2) {
    if (!(f.bits & width)) continue;
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
  return MatrixStorage::quantized(parts, team);
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
  static const AlignedBytes scratch(static_cast<std::size_t>(kMatmulScratch));
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
        int8.add(*set, multiply(set->matmul_int8, w, inputs.int8, 0, rows, 0));
        part.add(*set, multiply(set->matmul_int8, w, inputs.int8, from, rows, panel));
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
                           std::to_string(rows) + " x " + std::to_string(columns);
  test_matmuls(storage->matrix(), what, digest);
  Comparison decoded(what + ", decode_row", &digest);
  for (const Kernels* set : all_sets) {
    std::vector<float> out(static_cast<std::size_t>(rows * columns));
    for (std::int64_t r = 0; r < rows; ++r) set->decode_row(storage->matrix(), r, out.data() + r * columns);
    decoded.add(*set, out);
  }
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
  test_matrix({4, false, 64, false, Number::half}, 35, 1100, team, digest);
  test_matrix({7, false, 64, true, Number::half}, 35, 1100, team, digest);
  for (const Number kind : {Number::half, Number::bfloat, Number::single}) {
    const std::vector<std::uint8_t> values = random_numbers(37 * 150, kind, 3);
    const auto storage = MatrixStorage::dense(values.data(), 37, 150, kind, team);
    test_matmuls(storage->matrix(), "dense " + std::to_string(bytes_of(kind)) + " bytes", digest);
  }
}

// --------------------------------------------------------------------------------------------------------- rows

void test_rows(Digest& digest) {
  for (const std::int64_t count : {std::int64_t{1}, std::int64_t{16}, std::int64_t{31}, std::int64_t{576}}) {
    const auto seed = static_cast<std::uint64_t>(count);
    const std::vector<float> x = random_floats(count, seed, 40.0f), y = random_floats(count, seed + 1, 2.0f);
    const std::string name = " of " + std::to_string(count);
    Comparison norm("rms_norm" + name, &digest), sum("add" + name, &digest);
    for (const Kernels* set : all_sets) {
      std::vector<float> out(static_cast<std::size_t>(padded(count)));
      set->rms_norm(x.data(), y.data(), count, 1e-5f, out.data());
      norm.add(*set, out);
      out.assign(y.begin(), y.end());
      set->add(x.data(), out.data(), count);
      sum.add(*set, out);
    }
    for (const Activation kind : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu,
                                  Activation::elu}) {
      // gelu calls erff, which differs from one C library to another.
      Comparison gated("activation" + name, kind == Activation::gelu ? nullptr : &digest);
      for (const Kernels* set : all_sets) {
        std::vector<float> out(static_cast<std::size_t>(count) + 3, -7.0f);
        set->activate(x.data(), y.data(), out.data(), count, kind);
        gated.add(*set, out);
      }
    }
  }
}

void test_trace(Digest& digest) {
  Random random(5);
  std::vector<std::uint8_t> data(192 * 50);
  for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(random.next() >> 33);
  const std::vector<float> normal = random_floats(48 * 20, 6);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(normal.data());
  data.insert(data.end(), bytes, bytes + normal.size() * 4);
  for (std::uint32_t half = 0; half < (quick ? 192u : 65536u); ++half) {  // every half, as a pair with another
    const std::uint32_t both = half | (half * 40503u) << 16;
    const auto* at = reinterpret_cast<const std::uint8_t*>(&both);
    data.insert(data.end(), at, at + 4);
  }
  Comparison equal("vector operations", &digest);
  for (const Kernels* set : all_sets) {
    const auto bytes_in = static_cast<std::int64_t>(data.size());
    const std::int64_t bytes_out = set->trace(data.data(), bytes_in, nullptr, 0);
    std::vector<std::uint8_t> out(static_cast<std::size_t>(bytes_out));
    set->trace(data.data(), bytes_in, out.data(), bytes_out);
    equal.add(*set, out);
  }
}

// ---------------------------------------------------------------------------------------------------- attention

struct Shape {
  int heads, kv_heads, head_dim, rotated_half, window;
};

// A prompt of two sequences, cut into two passes, then tokens one by one: all outputs.
std::vector<float> attend(const Kernels& set, Team& team, const Shape& s, const std::string& kind) {
  constexpr std::int64_t kBatch = 2, kCapacity = 300;
  std::vector<std::int64_t> passes{150, 33, 1, 3};
  if (quick) passes = {17, 1};
  constexpr std::int32_t kTables[kBatch][5] = {{3, 7, 1, 9, 4}, {0, 8, 2, 5, 6}};  // pages in no order
  KVPages cache(1, s.kv_heads, s.head_dim, kind, 10);
  const std::vector<float> cos = random_floats(kCapacity * s.rotated_half, 1);
  const std::vector<float> sin = random_floats(kCapacity * s.rotated_half, 2);
  std::vector<float> results;
  std::int64_t done = 0;
  for (const std::int64_t tokens : passes) {
    const std::int64_t rows = tokens * kBatch, q_width = std::int64_t{s.heads} * s.head_dim;
    const std::int64_t k_width = std::int64_t{s.kv_heads} * s.head_dim;
    const auto seed = static_cast<std::uint64_t>(done);
    const std::vector<float> q = random_floats(rows * q_width, seed + 3, 2.0f);
    const std::vector<float> k = random_floats(rows * k_width, seed + 4, 2.0f);
    const std::vector<float> v = random_floats(rows * k_width, seed + 5);
    std::vector<std::int32_t> sequence, position;
    for (int b = 0; b < kBatch; ++b)
      for (std::int64_t t = 0; t < tokens; ++t) {
        sequence.push_back(b);
        position.push_back(static_cast<std::int32_t>(done + t));
      }
    std::vector<float> out(static_cast<std::size_t>(rows * q_width));
    const AttentionArgs args{q.data(),        k.data(),   v.data(),       out.data(), q_width,
                             k_width,         k_width,    q_width,        rows,       sequence.data(),
                             position.data(), cos.data(), sin.data(),     position.data(),
                             s.rotated_half,  s.heads,    s.kv_heads,     s.head_dim, 0.125f,
                             s.window,        &cache,     kTables[0],     5,          0};
    AttentionScratch scratch;
    scratch.prepare(rows, sequence.data(), position.data(), s.heads, s.kv_heads, s.head_dim, team.size());
    team.run([&](Worker& worker) { attention(set.attention, worker, args, scratch); });
    results.insert(results.end(), out.begin(), out.end());
    done += tokens;
  }
  return results;
}

void test_attention(Team& one, Team& three, Digest& digest) {
  const Shape shapes[] = {{6, 2, 64, 32, 0}, {4, 4, 48, 8, 40}, {3, 1, 80, 40, 0}};
  for (const Shape& s : shapes) {
    for (const char* kind : {"fp32", "fp16", "8", "4", "3", "2"}) {
      Comparison equal(std::string("attention, cache ") + kind + ", head " + std::to_string(s.head_dim), &digest);
      for (const Kernels* set : all_sets) {
        equal.add(*set, attend(*set, one, s, kind));
        equal.add(*set, attend(*set, three, s, kind));
      }
    }
    if (quick) break;
  }
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  Team one(1), three(3);
  const auto group = [](const char* name, auto&& test) {
    Digest digest;
    test(digest);
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(digest.value));
  };
  group("operations", [](Digest& digest) { test_trace(digest); });
  group("rows", [](Digest& digest) { test_rows(digest); });
  group("matmul", [&](Digest& digest) { test_all_matmuls(one, digest); });
  group("attention", [&](Digest& digest) { test_attention(one, three, digest); });
  std::fprintf(stderr, "%d comparisons, %d differences\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}
