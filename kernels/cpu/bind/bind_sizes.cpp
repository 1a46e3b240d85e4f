// Python bindings of sizes: what the engine will allocate, for those who plan memory before there is a model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "attention/attention_kernels.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "codecs/matrix_storage.h"
#include "program/program_scratch.h"

namespace nb = nanobind;

namespace kbit {
namespace {

std::size_t matrix_bytes(std::int64_t rows, std::int64_t columns, int bits, std::int64_t block_size,
                         const std::string& kind, bool offsets, bool half) {
  const bool codes = bits >= 2 && bits <= 8 && block_size >= 0 && block_size % 16 == 0;
  if (!(bits == 0 || codes)) throw std::invalid_argument("there is no such matrix");
  require_sizes(rows, columns, block_size);
  return MatrixStorage::size_of({rows, columns, bits, block_size, number_named(kind), offsets, Code::planes, 0, 0, false,
                                 half});
}

}  // namespace

void bind_sizes(nb::module_& module) {
  module.def("matrix_bytes", &matrix_bytes, nb::arg("rows"), nb::arg("columns"), nb::arg("bits"), nb::arg("block_size"),
             nb::arg("kind"), nb::arg("offsets"), nb::arg("half") = false,
             "Bytes of a prepared matrix. bits: 0 for dense values; kind: of these or of the scales; half: of a "
             "trellis with half a bit more.");
  module.def("matrix_segment", &integer_segment, nb::arg("block_size"),
             "Columns that an int8 product sums as integers.");
  module.def(
      "attention_task_bytes",
      [](std::int64_t rows, std::int64_t head_dim) {
        require(rows >= 0 && head_dim >= 0 && rows <= 1 << 24 && head_dim <= 1 << 24, "there is no such attention");
        const std::int64_t padded = (head_dim + 15) / 16 * 16;
        return 4 * task_memory(rows, head_dim, padded, padded / 16).total;
      },
      nb::arg("rows"), nb::arg("head_dim"), "Scratch of one thread's attention; rows: of (token, head), at most.");
  module.attr("TILE_COLUMNS") = kTileColumns;
  module.attr("ATTENTION_CHUNK") = kChunk;
  module.attr("REDUNDANT_INPUT") = kRedundantInput;
  module.attr("THREAD_SCRATCH_BYTES") = kMatmulScratch + kTrellisScratch + 3 * 4 * kStaging;
}

}  // namespace kbit
