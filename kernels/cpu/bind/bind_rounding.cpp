// Python bindings of rounding with feedback.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "isa/isa.h"
#include "isa/kernel_table.h"
#include "rounding/descent.h"
#include "rounding/nested_descent.h"
#include "rounding/rounding.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Levels = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LevelCodes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = Levels;
using BlocksOf = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using TableOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using PlanesOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

ScaleType scale_type_named(const std::string& name) {
  if (name == "fp16") return ScaleType::half;
  if (name == "bf16") return ScaleType::bfloat;
  if (name == "fp32") return ScaleType::single;
  throw std::invalid_argument("scale type " + name + " is none of fp16, bf16, fp32");
}

template <class A> void require(const A& array, std::int64_t rows, std::int64_t columns, const char* what) {
  if (std::int64_t(array.shape(0)) != rows || std::int64_t(array.shape(1)) != columns) {
    throw std::invalid_argument(std::string(what) + " must have shape (" + std::to_string(rows) + ", " +
                                std::to_string(columns) + ")");
  }
}

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

using Scratch = std::unique_ptr<float[], FreeAligned>;

Scratch make_scratch(std::int64_t count) {
  return Scratch(static_cast<float*>(::operator new[](sizeof(float) * std::size_t(count), std::align_val_t(64))));
}

Grid make_grid(const Levels& levels, const LevelCodes& codes) {
  for (std::size_t i = 0; i < levels.shape(0); ++i) {
    if (!std::isfinite(levels.data()[i])) throw std::invalid_argument("levels must be finite");
  }
  return Grid({levels.data(), levels.data() + levels.shape(0)}, {codes.data(), codes.data() + codes.shape(0)});
}

void round_matrix(Table weights, std::optional<Table> correction, std::optional<Table> feedback, Vector importance,
                  Levels levels, LevelCodes codes_of_levels, std::int64_t block, const std::string& scale_type,
                  bool asymmetric, Vector shares, std::optional<Table> given_scales, std::optional<Table> given_offsets,
                  CodesOut codes, TableOut scales, std::optional<TableOut> offsets, std::optional<TableOut> residual,
                  std::optional<BlocksOf> blocks_of, const std::string& isa) {
  const std::int64_t rows = std::int64_t(weights.shape(0)), columns = std::int64_t(weights.shape(1));
  if (rows < 1 || columns < 1) throw std::invalid_argument("there are no weights");
  if (block < 1) throw std::invalid_argument("a block has at least one column");
  block = std::min(block, columns);
  const std::int64_t blocks = (columns + block - 1) / block;
  if (correction) require(*correction, rows, columns, "correction");
  if (feedback) require(*feedback, columns, columns, "feedback");
  if (std::int64_t(importance.shape(0)) != columns) throw std::invalid_argument("importance is one number per column");
  if (given_scales) require(*given_scales, rows, blocks, "given scales");
  if (given_offsets) require(*given_offsets, rows, blocks, "given offsets");
  if (given_scales && asymmetric && !given_offsets) throw std::invalid_argument("scales are given, but no offsets");
  if (blocks_of) {
    if (!given_scales) throw std::invalid_argument("columns out of the order of their blocks need given scales");
    if (std::int64_t(blocks_of->shape(0)) != columns) throw std::invalid_argument("blocks_of is one number per column");
    for (std::int64_t i = 0; i < columns; ++i) {
      if (blocks_of->data()[i] < 0 || blocks_of->data()[i] >= blocks) throw std::invalid_argument("there is no such block");
    }
  }
  if (asymmetric && !offsets) throw std::invalid_argument("offsets have nowhere to go");
  require(codes, rows, columns, "codes");
  require(scales, rows, blocks, "scales");
  if (offsets) require(*offsets, rows, blocks, "offsets");
  if (residual) require(*residual, rows, columns, "residual");
  const Grid grid = make_grid(levels, codes_of_levels);
  const ScaleType type = scale_type_named(scale_type);
  const Kernels* kernels = find_kernels(choose_instruction_set(isa).c_str());
  const Scratch scratch = make_scratch(round_scratch(columns));
  nb::gil_scoped_release release;
  for (std::int64_t begin = 0; begin < rows; begin += kRoundedRows) {
    RoundTask task = {};
    task.grid = &grid;
    task.scale_type = type;
    task.asymmetric = asymmetric;
    task.rows = std::min<std::int64_t>(kRoundedRows, rows - begin);
    task.columns = columns;
    task.block = block;
    task.weights = weights.data() + begin * columns;
    task.correction = correction ? correction->data() + begin * columns : nullptr;
    task.feedback = feedback ? feedback->data() : nullptr;
    task.importance = importance.data();
    task.shares = shares.data();
    task.share_count = std::int64_t(shares.shape(0));
    task.given_scales = given_scales ? given_scales->data() + begin * blocks : nullptr;
    task.given_offsets = given_offsets ? given_offsets->data() + begin * blocks : nullptr;
    task.blocks_of = blocks_of ? blocks_of->data() : nullptr;
    task.codes = codes.data() + begin * columns;
    task.scales = scales.data() + begin * blocks;
    task.offsets = offsets ? offsets->data() + begin * blocks : nullptr;
    task.residual = residual ? residual->data() + begin * columns : nullptr;
    task.scratch = scratch.get();
    kernels->round_rows(task);
  }
}

void descend_rows(Table slopes, Table inputs, Table outputs, Levels levels, LevelCodes codes_of_levels,
                  std::int64_t block, const std::string& scale_type, bool fixed_scales, CodesOut codes, TableOut scales,
                  std::optional<TableOut> offsets, TableOut change, const std::string& isa) {
  const std::int64_t rows = std::int64_t(slopes.shape(0)), columns = std::int64_t(slopes.shape(1));
  if (rows < 1 || rows > kRoundedRows || columns < 1) throw std::invalid_argument("1 to 16 rows are worked on at once");
  if (block < 1) throw std::invalid_argument("a block has at least one column");
  block = std::min(block, columns);
  const std::int64_t blocks = (columns + block - 1) / block;
  require(inputs, columns, columns, "inputs");
  require(outputs, rows, rows, "outputs");
  require(codes, rows, columns, "codes");
  require(scales, rows, blocks, "scales");
  if (offsets) require(*offsets, rows, blocks, "offsets");
  require(change, rows, columns, "change");
  const Grid grid = make_grid(levels, codes_of_levels);
  const Kernels* kernels = find_kernels(choose_instruction_set(isa).c_str());
  const Scratch scratch = make_scratch(descent_scratch(columns));
  DescentTask task = {};
  task.grid = &grid;
  task.scale_type = scale_type_named(scale_type);
  task.asymmetric = offsets.has_value();
  task.fixed_scales = fixed_scales;
  task.rows = rows;
  task.columns = columns;
  task.block = block;
  task.slopes = slopes.data();
  task.inputs = inputs.data();
  task.outputs = outputs.data();
  task.codes = codes.data();
  task.scales = scales.data();
  task.offsets = offsets ? offsets->data() : nullptr;
  task.change = change.data();
  task.scratch = scratch.get();
  nb::gil_scoped_release release;
  kernels->descend_rows(task);
}

void descend_nested_rows(Planes slopes, Table inputs, Table outputs, const std::vector<Levels>& levels,
                         const std::vector<float>& weights, std::int64_t block, Planes scales, CodesOut codes,
                         PlanesOut change, const std::string& isa) {
  const std::size_t widths = levels.size();
  if (widths < 1 || widths > kMostWidths || weights.size() != widths) throw std::invalid_argument("1 to 7 widths, a weight each");
  const std::int64_t rows = std::int64_t(codes.shape(0)), columns = std::int64_t(codes.shape(1));
  if (rows < 1 || rows > kRoundedRows || columns < 1) throw std::invalid_argument("1 to 16 rows at once");
  if (block < 1) throw std::invalid_argument("a block has at least one column");
  block = std::min(block, columns);
  const std::int64_t blocks = (columns + block - 1) / block;
  const auto of_widths = [&](const auto& array, std::int64_t wide, const char* what) {
    if (array.shape(0) != widths || std::int64_t(array.shape(1)) != rows || std::int64_t(array.shape(2)) != wide)
      throw std::invalid_argument(std::string(what) + " has the wrong shape");
  };
  of_widths(slopes, columns, "slopes");
  of_widths(change, columns, "change");
  of_widths(scales, blocks, "scales");
  require(inputs, columns, columns, "inputs");
  require(outputs, rows, rows, "outputs");
  NestedDescentTask task = {};
  task.widths = static_cast<int>(widths);
  const Scratch padded = make_scratch(kMostWidths * 256);  // codes are looked at 16 at a time
  std::fill(padded.get(), padded.get() + kMostWidths * 256, 0.0f);
  for (std::size_t p = 0; p < widths; ++p) {
    const std::size_t count = levels[p].shape(0);
    int bits = 2;
    while (bits < 8 && (std::size_t{1} << bits) < count) ++bits;
    if (count != std::size_t{1} << bits || (p > 0 && bits <= task.bits[p - 1]))
      throw std::invalid_argument("levels are 2^bits, of 2 to 8 bits, ascending");
    for (std::size_t i = 0; i < count; ++i) {
      if (!std::isfinite(levels[p].data()[i])) throw std::invalid_argument("levels must be finite");
    }
    std::copy(levels[p].data(), levels[p].data() + count, padded.get() + p * 256);
    task.bits[p] = bits;
    task.weights[p] = weights[p];
    task.levels[p] = padded.get() + p * 256;
  }
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    if (codes.data()[i] >> task.bits[widths - 1]) throw std::invalid_argument("there is no such code");
  }
  task.rows = rows;
  task.columns = columns;
  task.block = block;
  task.slope_stride = rows * columns;
  task.slopes = slopes.data();
  task.inputs = inputs.data();
  task.outputs = outputs.data();
  task.scale_stride = rows * blocks;
  task.scales = scales.data();
  task.codes = codes.data();
  task.change = change.data();
  const Scratch scratch = make_scratch(nested_descent_scratch(columns, task.widths));
  task.scratch = scratch.get();
  const Kernels* kernels = find_kernels(choose_instruction_set(isa).c_str());
  nb::gil_scoped_release release;
  kernels->descend_nested_rows(task);
}

}  // namespace

void bind_rounding(nb::module_& module) {
  module.def("descend_nested_rows", &descend_nested_rows, nb::arg("slopes").noconvert(),
             nb::arg("inputs").noconvert(), nb::arg("outputs").noconvert(), nb::arg("levels").noconvert(), nb::arg("weights"),
             nb::arg("block"), nb::arg("scales").noconvert(), nb::arg("codes").noconvert(), nb::arg("change").noconvert(),
             nb::arg("isa") = "",
             "Better nested codes for up to 16 rows, all widths together; kernels/cpu/rounding/nested_descent.h.");
  module.def("round_matrix", &round_matrix, nb::arg("weights").noconvert(), nb::arg("correction").noconvert().none(),
             nb::arg("feedback").noconvert().none(), nb::arg("importance").noconvert(), nb::arg("levels").noconvert(),
             nb::arg("codes_of_levels").noconvert(), nb::arg("block"), nb::arg("scale_type"), nb::arg("asymmetric"),
             nb::arg("shares").noconvert(), nb::arg("given_scales").noconvert().none(),
             nb::arg("given_offsets").noconvert().none(), nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
             nb::arg("offsets").noconvert().none(), nb::arg("residual").noconvert().none(),
             nb::arg("blocks_of").noconvert().none() = nb::none(), nb::arg("isa") = "",
             "Round rows of a matrix, errors of columns passed on to those before (kernels/cpu/rounding/rounding.h). "
             "All rows are independent of each other. Runs in the calling thread. With blocks_of, scales and offsets are "
             "not written: they are the given ones.");
  module.def("descend_rows", &descend_rows, nb::arg("slopes").noconvert(), nb::arg("inputs").noconvert(),
             nb::arg("outputs").noconvert(), nb::arg("levels").noconvert(), nb::arg("codes_of_levels").noconvert(),
             nb::arg("block"), nb::arg("scale_type"), nb::arg("fixed_scales"), nb::arg("codes").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("offsets").noconvert().none(), nb::arg("change").noconvert(),
             nb::arg("isa") = "",
             "Better scales and codes for up to 16 rows that are rounded already (kernels/cpu/rounding/descent.h). Runs "
             "in the calling thread.");
}

}  // namespace kbit
