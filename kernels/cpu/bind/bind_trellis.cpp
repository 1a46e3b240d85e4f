// Python bindings of trellis codes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <new>
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

void search(Numbers numbers, Values values, int bits, Strings strings, Context& context, bool half) {
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
  const auto each = std::size_t((trellis_scratch(code) + 63) / 64 * 64);
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
             "Code tiles of 256 numbers in strings of 256 bits (kernels/cpu/rounding/trellis.h): numbers float32 (T, 256) "
             "of about unit variance, values float32 (2^L) of the windows, strings uint8 (T, 32 bits). half: every "
             "second number has a bit more, and strings have 16 bytes more. Runs on the context's threads; the result "
             "does not depend on them.");
}

}  // namespace kbit
