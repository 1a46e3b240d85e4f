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

}  // namespace kbit
