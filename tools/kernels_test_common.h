// What the checks of kernels_test.cpp share: the instruction sets compared, made-up numbers, comparing.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "isa/kernel_table.h"
#include "isa/kernels.h"

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

}  // namespace
