// Python bindings of the native kernels (module kbit._native). Arrays cross as DLPack, so torch tensors and numpy
// arrays are both accepted without a copy; shapes are checked here, once, so the kernels need not.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

#include "bind/bind.h"
#include "codecs/bitplanes.h"

namespace nb = nanobind;

namespace {

using Bytes2D = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBytes2D = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_plane(std::size_t rows, std::size_t columns, std::size_t plane_rows, std::size_t plane_bytes,
                 unsigned width, unsigned shift) {
  if (width != 1 && width != 2 && width != 4 && width != 8) throw std::invalid_argument("width must be 1, 2, 4 or 8");
  if (shift > 8 - width) throw std::invalid_argument("shift + width must not exceed 8");
  if (plane_rows != rows || plane_bytes != kbit::plane_row_bytes(columns, width)) {
    throw std::invalid_argument("plane must have shape (rows, ceil(columns * width / 8))");
  }
}

void pack_plane(ConstBytes2D codes, unsigned width, unsigned shift, Bytes2D plane) {
  check_plane(codes.shape(0), codes.shape(1), plane.shape(0), plane.shape(1), width, shift);
  nb::gil_scoped_release release;
  kbit::pack_plane(codes.data(), codes.shape(0), codes.shape(1), width, shift, plane.data());
}

void unpack_plane(ConstBytes2D plane, unsigned width, unsigned shift, bool first, Bytes2D codes) {
  check_plane(codes.shape(0), codes.shape(1), plane.shape(0), plane.shape(1), width, shift);
  nb::gil_scoped_release release;
  kbit::unpack_plane(plane.data(), codes.shape(0), codes.shape(1), width, shift, first, codes.data());
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "kbit's native CPU kernels.";
  // noconvert: otherwise an array of the wrong type or layout is copied first, and results are written to the copy.
  module.def("pack_plane", &pack_plane, nb::arg("codes").noconvert(), nb::arg("width"), nb::arg("shift"),
             nb::arg("plane").noconvert(),
             "Cut bits [shift, shift + width) of uint8 codes (N, K) into plane (N, ceil(K * width / 8)).");
  module.def("unpack_plane", &unpack_plane, nb::arg("plane").noconvert(), nb::arg("width"), nb::arg("shift"),
             nb::arg("first"), nb::arg("codes").noconvert(),
             "Write (first) or OR a plane's bits into uint8 codes (N, K) at bit `shift`.");
  kbit::bind_matrix(module);
  kbit::bind_program(module);
  kbit::bind_kv_pages(module);
  kbit::bind_sizes(module);
  kbit::bind_mapped(module);
  kbit::bind_rounding(module);
  kbit::bind_text(module);
  kbit::bind_levels(module);
  kbit::bind_trellis(module);
  kbit::bind_sampling(module);
}
