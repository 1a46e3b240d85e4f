// Python bindings of Context and Matrix: the kernels of an instruction set, and weights in their layout.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "codecs/bitplanes.h"
#include "isa/isa.h"
#include "program/program.h"

namespace nb = nanobind;

namespace kbit {
namespace {

Number number_kind(const std::string& name) {
  if (name == "fp16") return Number::half;
  if (name == "bf16") return Number::bfloat;
  require(name == "fp32", "a number type is fp16, bf16 or fp32");
  return Number::single;
}

// 16-bit floats come as uint16.
void require_numbers(const Untyped& array, Number kind, std::int64_t rows, std::int64_t columns) {
  const nb::dlpack::dtype wanted = kind == Number::single ? nb::dtype<float>() : nb::dtype<std::uint16_t>();
  require(array.dtype() == wanted, "fp16 and bf16 are passed as uint16, fp32 as float32");
  require(array.ndim() == 2 && static_cast<std::int64_t>(array.shape(0)) == rows &&
              static_cast<std::int64_t>(array.shape(1)) == columns,
          "an array has the wrong shape");
}

void require_signs(const std::optional<Array<const std::uint8_t, 1>>& signs, std::int64_t mixed, std::int64_t columns) {
  require_mixed(mixed, columns);
  require(signs.has_value() == (mixed > 0), "rotated columns have signs");
  require(!signs || static_cast<std::int64_t>(signs->shape(0)) == (columns + 15) / 16 * 2, "there is a sign for each column");
}

Weights quantized_matrix(const std::vector<Array<const std::uint8_t, 2>>& planes, int bits, std::int64_t columns,
                         std::int64_t block_size, const Untyped& scales, const std::optional<Untyped>& offsets,
                         const std::string& scale_kind, const Array<const float, 1>& codebook, Context& context,
                         const std::optional<Array<const std::uint8_t, 1>>& signs, std::int64_t mixed, bool apart) {
  require(bits >= 2 && bits <= 8, "bits are 2 to 8");
  require(columns >= 1 && block_size >= 0 && block_size % 16 == 0, "a block is 0 (a row) or a multiple of 16 columns");
  require(!planes.empty(), "there are no planes");
  require_sizes(static_cast<std::int64_t>(planes[0].shape(0)), columns, block_size);
  QuantizedParts parts{};
  parts.rows = static_cast<std::int64_t>(planes[0].shape(0));
  parts.columns = columns;
  parts.bits = bits;
  parts.block_size = block_size;
  parts.apart = apart;
  std::vector<unsigned> widths;
  if (apart) {
    require(bits >= 3, "planes are kept apart from 3 bits on");
    widths.assign(static_cast<std::size_t>(bits - 1), 1);
    widths[0] = 2;
  } else {
    for (unsigned width = 8; width > 0; width /= 2)
      if (static_cast<unsigned>(bits) & width) widths.push_back(width);
  }
  require_signs(signs, mixed, columns);
  const auto coded = static_cast<std::size_t>(coded_columns(columns, mixed));
  std::size_t used = 0;
  for (const unsigned width : widths) {
    require(used < planes.size(), "a bit plane is missing");
    const auto& plane = planes[used++];
    require(static_cast<std::int64_t>(plane.shape(0)) == parts.rows &&
                plane.shape(1) == plane_row_bytes(coded, width),
            "a bit plane has the wrong shape");
    parts.planes.push_back(plane.data());
  }
  require(used == planes.size() && parts.rows >= 1, "there are more bit planes than the width has, or no rows");
  parts.scale_kind = number_kind(scale_kind);
  const std::int64_t blocks = block_size ? (columns + block_size - 1) / block_size : 1;
  require_numbers(scales, parts.scale_kind, parts.rows, blocks);
  parts.scales = scales.data();
  if (offsets) {
    require_numbers(*offsets, parts.scale_kind, parts.rows, blocks);
    parts.offsets = offsets->data();
  }
  require(codebook.shape(0) == (std::size_t{1} << bits), "a codebook has 2^bits values");
  parts.codebook = codebook.data();
  parts.mixed = mixed;
  parts.signs = signs ? signs->data() : nullptr;
  nb::gil_scoped_release release;
  return MatrixStorage::quantized(parts, *context.team);
}

Weights trellis_matrix(const Array<const std::uint8_t, 3>& codes, int bits, const std::string& code, int window,
                       std::int64_t columns, const Array<const std::uint16_t, 2>& scales,
                       const Array<const std::uint8_t, 1>& signs, std::int64_t mixed, Context& context, bool half) {
  TrellisParts parts{};
  parts.rows = static_cast<std::int64_t>(scales.shape(0));
  parts.columns = columns;
  parts.bits = bits;
  parts.half = half;
  parts.code = code_named(code);
  parts.window = window;
  require_sizes(parts.rows, columns, 0);
  require(parts.code != Code::planes && mixed > 0, "a trellis has rows, and is rotated");
  require_trellis(parts.code, bits, half, window);
  require_signs(signs, mixed, columns);
  require(scales.shape(1) == 1, "a trellis has one scale a row");
  require(static_cast<std::int64_t>(codes.shape(0)) == (parts.rows + 15) / 16 &&
              static_cast<std::int64_t>(codes.shape(1)) == (columns + 15) / 16 && codes.shape(2) == std::size_t(16 * (2 * bits + half)),
          "codes must have shape (rows / 16, columns / 16, 32 bits): 16 bytes more with half a bit");
  parts.codes = codes.data();
  parts.scales = scales.data();
  parts.mixed = mixed;
  parts.signs = signs.data();
  nb::gil_scoped_release release;
  return MatrixStorage::trellis(parts, *context.team);
}

Weights dense_matrix(const Untyped& values, const std::string& kind, Context& context) {
  require(values.ndim() == 2 && values.shape(0) >= 1 && values.shape(1) >= 1, "a matrix has two dimensions");
  const auto rows = static_cast<std::int64_t>(values.shape(0)), columns = static_cast<std::int64_t>(values.shape(1));
  const Number number = number_kind(kind);
  require_numbers(values, number, rows, columns);
  nb::gil_scoped_release release;
  return MatrixStorage::dense(values.data(), rows, columns, number, *context.team);
}

}  // namespace

void bind_matrix(nb::module_& module) {
  module.def("instruction_sets", &instruction_sets, "Instruction sets this machine can run, best last.");
  module.def("compiled_sets", &compiled_sets, "Instruction sets that are compiled in, on any machine.");
  module.def("emulated_sets", &emulated_sets, "Instruction sets emulated in plain C++, for tests.");

  nb::class_<Context>(module, "Context", "Kernels of one instruction set, and the threads that run them.")
      .def("__init__",
           [](Context* self, const std::optional<std::string>& isa, int threads) {
             new (self) Context(isa.value_or(""), threads);
           },
           nb::arg("isa") = nb::none(), nb::arg("threads") = 1,
           "isa: a name from instruction_sets(), or None for the best, or the one KBIT_CPU_ISA names.")
      .def_prop_ro("isa", [](const Context& c) { return std::string(c.kernels->name); })
      .def_prop_ro("has_bf16", [](const Context& c) { return c.kernels->matmul_bf16 != nullptr; })
      .def_prop_ro("threads", [](const Context& c) { return c.team->size(); });

  nb::class_<MatrixStorage>(module, "Matrix", "A weight matrix (N, K) in the layout of kernels/cpu/codecs/matrix.h.")
      .def_static("quantized", &quantized_matrix, nb::arg("planes"), nb::arg("bits"), nb::arg("columns"),
                  nb::arg("block_size"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("scale_kind"),
                  nb::arg("codebook"), nb::arg("context"), nb::arg("signs") = nb::none(), nb::arg("mixed") = 0,
                  nb::arg("apart") = false)
      .def_static("trellis", &trellis_matrix, nb::arg("codes"), nb::arg("bits"), nb::arg("code"), nb::arg("window"),
                  nb::arg("columns"), nb::arg("scales"), nb::arg("signs"), nb::arg("mixed"), nb::arg("context"),
                  nb::arg("half") = false)
      .def_static("dense", &dense_matrix, nb::arg("values"), nb::arg("kind"), nb::arg("context"))
      .def("selection",
           [](std::shared_ptr<MatrixStorage> m, std::int64_t panels) {
             return MatrixStorage::selection(std::move(m), panels);
           },
           nb::arg("panels"), "Room for copies of some panels of 16 rows, at first all of them the first.")
      .def("take",
           [](MatrixStorage& m, const Array<const std::int64_t, 1>& places, const Array<const std::int64_t, 1>& panels) {
             require(places.shape(0) == panels.shape(0), "every place gets a panel");
             for (std::size_t i = 0; i < places.shape(0); ++i) m.take(places.data()[i], panels.data()[i]);
           },
           nb::arg("places"), nb::arg("panels"), "Copies panels into a selection. No pass may use it meanwhile.")
      .def("keep_apart",
           [](MatrixStorage& m, const Array<const std::int32_t, 1>& rows, const Array<const std::int32_t, 1>& columns,
              const Array<const float, 1>& values) {
             require(rows.shape(0) == columns.shape(0) && rows.shape(0) == values.shape(0), "every weight has a row and a column");
             m.keep_apart(rows.data(), columns.data(), values.data(), static_cast<std::int64_t>(rows.shape(0)));
           },
           nb::arg("rows"), nb::arg("columns"), nb::arg("values"),
           "Weights to add to those that codes stand for, rows ascending. Once, before the matrix is used.")
      .def_prop_ro("rows", [](const MatrixStorage& m) { return m.matrix().rows; })
      .def_prop_ro("columns", [](const MatrixStorage& m) { return m.matrix().columns; })
      .def_prop_ro("bits", [](const MatrixStorage& m) { return m.matrix().bits; })
      .def_prop_ro("two_digits", [](const MatrixStorage& m) { return m.matrix().two_digits; })
      .def_prop_ro("nbytes", &MatrixStorage::nbytes)
      .def_prop_ro("rotated", [](const MatrixStorage& m) { return m.matrix().mixed > 0; })
      .def("shares_input", [](const MatrixStorage& m, const MatrixStorage& other) { return m.matrix().shares_input(other.matrix()); },
           nb::arg("other"), "Whether one product can take an input for both: they do not rotate it in different ways.");

  module.def("simd_trace",
             [](const std::string& isa, const Array<const std::uint8_t, 1>& data) {
               const Context context(isa, 1);
               const auto bytes = static_cast<std::int64_t>(data.shape(0));
               std::vector<std::uint8_t> out(static_cast<std::size_t>(context.kernels->trace(data.data(), bytes, nullptr, 0)));
               context.kernels->trace(data.data(), bytes, out.data(), static_cast<std::int64_t>(out.size()));
               return nb::bytes(reinterpret_cast<const char*>(out.data()), out.size());
             },
             nb::arg("isa"), nb::arg("data"),
             "Every vector operation of an instruction set applied to data (uint8), for comparing sets.");
}

}  // namespace kbit
