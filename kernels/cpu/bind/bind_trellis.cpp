// Python bindings of trellis codes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "codecs/matrix_storage.h"
#include "program/context.h"
#include "rounding/trellis.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Numbers = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Strings = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const std::int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const std::int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void search(Numbers numbers, Values values, int bits, Strings strings, Context& context, bool half,
            std::optional<Columns> columns, std::optional<Rows> rows) {
  int window = 0;
  while ((std::size_t(1) << window) < values.shape(0)) ++window;
  if (std::size_t(1) << window != values.shape(0)) throw std::invalid_argument("there is a value for each window: 2^L");
  const TrellisCode code(bits, half, window, values.data());
  const int bytes = trellis_bytes(bits, half);
  const auto tiles = std::int64_t(numbers.shape(0));
  if (numbers.shape(1) != std::size_t(kTrellisTile)) throw std::invalid_argument("a tile has 256 numbers");
  if (std::int64_t(strings.shape(0)) != tiles || std::int64_t(strings.shape(1)) != bytes) {
    throw std::invalid_argument("strings must have shape (tiles, 32 bits): 16 bytes more with half a bit");
  }
  const auto is_of_tiles = [&](const auto& factors) {
    return factors.shape(0) == std::size_t(tiles) && factors.shape(1) == 16 && factors.shape(2) == 16;
  };
  if (columns.has_value() != rows.has_value() || (columns && !(is_of_tiles(*columns) && is_of_tiles(*rows)))) {
    throw std::invalid_argument("feedback must be two arrays of shape (tiles, 16, 16)");
  }
  for (std::size_t i = 0; columns && i < columns->size(); ++i) {
    if (columns->data()[i] == INT16_MIN) throw std::invalid_argument("feedback along columns must be above -32768");
  }
  const auto each = std::size_t((trellis_scratch(code, columns.has_value()) + 63) / 64 * 64);
  nb::gil_scoped_release release;
  std::vector<AlignedBytes> scratch;
  for (int i = 0; i < context.team->size(); ++i) scratch.emplace_back(each);
  context.team->run([&](Worker& worker) {
    worker.for_each(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        TrellisTask task = {};
        task.code = &code;
        task.numbers = numbers.data() + i * kTrellisTile;
        task.string = strings.data() + i * bytes;
        if (columns) task.feedback = {columns->data() + i * kTrellisTile, rows->data() + i * kTrellisTile};
        task.scratch = scratch[std::size_t(worker.index())].data();
        context.kernels->trellis_search(task);
      }
    });
  });
}

}  // namespace

void bind_trellis(nb::module_& module) {
  module.def("trellis_search", &search, nb::arg("numbers").noconvert(), nb::arg("values").noconvert(), nb::arg("bits"),
             nb::arg("strings").noconvert(), nb::arg("context"), nb::arg("half") = false,
             nb::arg("columns").noconvert() = nb::none(), nb::arg("rows").noconvert() = nb::none(),
             "Code tiles of 256 numbers in strings of 256 bits (kernels/cpu/rounding/trellis.h): numbers float32 (T, 256) "
             "of about unit variance, values float32 (2^L) of the windows, strings uint8 (T, 32 bits). half: every "
             "second number has a bit more, and strings have 16 bytes more. columns, rows: how errors are passed on within "
             "each tile, int16 (T, 16, 16) in units of 2^-15, above -32768, and int32 (T, 16, 16) in units of 2^-16; "
             "both or neither. Runs on the context's threads; the result does not depend on them.");
}

}  // namespace kbit
