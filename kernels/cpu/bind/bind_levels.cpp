// Bindings of codecs/level_tables.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "bind/bind.h"
#include "codecs/level_tables.h"

namespace nb = nanobind;

namespace {

using Bytes2D = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBytes2D = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Blocks = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename Value>
using Levels = nb::ndarray<const Value, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <typename Value>
using Matrix = nb::ndarray<Value, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void unpack(ConstBytes2D data, unsigned bits, Bytes2D codes) {
  if (bits < 1 || bits > 8) throw std::invalid_argument("bits must be 1 to 8");
  if (data.shape(0) != codes.shape(0) || data.shape(1) < (codes.shape(1) * bits + 7) / 8) {
    throw std::invalid_argument("data must have shape (rows, ceil(columns * bits / 8) or more)");
  }
  nb::gil_scoped_release release;
  kbit::unpack_stream(data.data(), data.shape(0), data.shape(1), bits, codes.shape(1), codes.data());
}

template <typename Value>
void look_up(ConstBytes2D codes, Levels<Value> levels, std::optional<Blocks> block_of, Matrix<Value> out) {
  const std::size_t rows = codes.shape(0), columns = codes.shape(1), blocks = levels.shape(1), size = levels.shape(2);
  if (levels.shape(0) != rows || out.shape(0) != rows || out.shape(1) != columns || blocks == 0) {
    throw std::invalid_argument("codes, levels and out must have the same rows, codes and out the same columns");
  }
  if (block_of ? block_of->shape(0) != columns : columns % blocks != 0) {
    throw std::invalid_argument("there must be whole blocks, or a block for every column");
  }
  nb::gil_scoped_release release;
  std::uint8_t largest = 0;
  for (std::size_t i = 0; i < rows * columns; ++i) largest = codes.data()[i] > largest ? codes.data()[i] : largest;
  bool inside = rows * columns == 0 || largest < size;
  for (std::size_t c = 0; block_of && c < columns; ++c) {
    inside = inside && block_of->data()[c] >= 0 && static_cast<std::size_t>(block_of->data()[c]) < blocks;
  }
  if (!inside) throw std::invalid_argument("a code or a block is outside of the levels");
  kbit::look_up_levels(codes.data(), rows, columns, levels.data(), blocks, size,
                       block_of ? block_of->data() : nullptr, out.data());
}

}  // namespace

void kbit::bind_levels(nb::module_& module) {
  module.def("unpack_stream", &unpack, nb::arg("data").noconvert(), nb::arg("bits"),
             nb::arg("codes").noconvert(), "Codes (N, K) of rows of bytes that are streams of them.");
  module.def("look_up_levels", &look_up<std::uint16_t>, nb::arg("codes").noconvert(),
             nb::arg("levels").noconvert(), nb::arg("block_of").none(), nb::arg("out").noconvert(),
             "out[n, k] = levels[n, block of k, codes[n, k]]; levels (N, blocks, size).");
  module.def("look_up_levels", &look_up<float>, nb::arg("codes").noconvert(), nb::arg("levels").noconvert(),
             nb::arg("block_of").none(), nb::arg("out").noconvert());
}
