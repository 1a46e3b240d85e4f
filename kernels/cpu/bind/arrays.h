// What every part of the Python module checks its arrays with.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

namespace kbit {

template <typename T, int kDims>
using Array = nanobind::ndarray<T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;
using Untyped = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using Vector = Array<const float, 1>;

// Throws std::invalid_argument, ValueError in Python.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Sizes whose products, and bytes, are far from what 64 bits hold.
inline void require_sizes(std::int64_t rows, std::int64_t columns, std::int64_t block_size) {
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  require(rows >= 1 && columns >= 1 && columns <= kMost && rows <= kMost / columns && block_size <= kMost,
          "a matrix has at least 1 and at most 2^40 weights");
}

}  // namespace kbit
