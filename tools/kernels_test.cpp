// Every kernel of some instruction sets against the scalar ones, byte for byte, on the same made-up inputs.
//
// For sets that the Python tests cannot run: Arm's under qemu (tools/arm/check.sh), AMX's machine code under a trap
// (tools/amx/check.sh). Compile with -DSETS='"scalar", "neon", ..' and link isa/kernel_table.cpp with those sets. Prints each
// difference and exits with 1, or prints a digest of the scalar results, which is the same on every machine.
//
// Usage: kernels_test [quick]      quick: a part of the widths and shapes
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "attention/attention_plan.h"
#include "attention/kv_pages.h"
#include "kernels_test_common.h"
#include "kernels_test_products.h"
#include "program/threads.h"

namespace {

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
  KVPages cache({{s.kv_heads, s.head_dim}}, kind, 10);
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
    AttentionArgs args{};
    args.q = q.data(), args.k = k.data(), args.v = v.data(), args.out = out.data();
    args.q_stride = args.out_stride = q_width, args.k_stride = args.v_stride = k_width;
    args.rows = rows;
    args.sequence = sequence.data(), args.position = args.rope_row = position.data();
    args.cos = cos.data(), args.sin = sin.data(), args.angle_stride = args.rotated_half = s.rotated_half;
    args.heads = s.heads, args.kv_heads = s.kv_heads, args.head_dim = s.head_dim;
    args.scale = 0.125f;
    args.window = s.window;
    args.cache = &cache, args.tables = kTables[0], args.table_stride = 5;
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
  group("trellises", [&](Digest& digest) { test_trellises(one, digest); });
  group("attention", [&](Digest& digest) { test_attention(one, three, digest); });
  std::fprintf(stderr, "%d comparisons, %d differences\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}
