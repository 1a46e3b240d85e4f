// Bindings of sampling/sampling.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "isa/isa.h"
#include "isa/kernel_table.h"
#include "sampling/sampling.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Logits = Array<const float, 2>;
using Rows = Array<const std::int64_t, 1>;
using Masks = std::vector<std::optional<Array<const bool, 1>>>;

void require_rows(const Logits& logits, const Rows& rows) {
  require(logits.shape(1) > 0 && logits.shape(1) <= std::size_t{1} << 30, "logits need a vocabulary");
  for (std::size_t i = 0; i < rows.shape(0); ++i) {
    require(rows.data()[i] >= 0 && static_cast<std::size_t>(rows.data()[i]) < logits.shape(0), "there is no such row");
  }
}

RowSampler make(double factor, std::int64_t top_k, double top_p, float min_score, double typical_p, float repetition,
                float presence, float frequency, Rows bias_tokens, Vector biases, std::uint64_t seed,
                std::uint64_t choice) {
  require(bias_tokens.shape(0) == biases.shape(0), "every bias has a token");
  // So that every cut keeps the largest logit; NaN is in no range.
  require(factor >= 0 && factor <= 1e30 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_score <= 0 && typical_p > 0 &&
              typical_p <= 1 && repetition >= 0 && presence == presence && frequency == frequency,
          "a setting of a sampler is out of range");
  SamplerSettings settings = {factor == 0, static_cast<float>(factor), top_k, top_p, min_score, typical_p, repetition,
                              presence, frequency, {}, seed, choice};
  for (std::size_t i = 0; i < biases.shape(0); ++i) {
    require(bias_tokens.data()[i] >= 0 && bias_tokens.data()[i] < std::int64_t{1} << 31, "a bias is for a token");
    settings.bias.emplace_back(static_cast<std::int32_t>(bias_tokens.data()[i]), biases.data()[i]);
  }
  return RowSampler(std::move(settings));
}

void sample_rows(const std::vector<RowSampler*>& samplers, Logits logits, Rows rows, const Masks& masks,
                 Array<std::int64_t, 1> tokens, Array<float, 1> best, const std::string& isa) {
  const std::size_t count = samplers.size();
  require(rows.shape(0) == count && tokens.shape(0) == count && best.shape(0) == count,
          "every sampler has a row, a token and a logit");
  for (const RowSampler* sampler : samplers) require(sampler != nullptr, "None is no sampler");
  require(masks.empty() || masks.size() == count, "every sampler has a mask or None, or there are no masks");
  require_rows(logits, rows);
  const Kernels& kernels = *find_kernels(choose_instruction_set(isa).c_str());
  nb::gil_scoped_release release;
  SamplingScratch scratch;
  const std::int64_t width = static_cast<std::int64_t>(logits.shape(1));
  for (std::size_t i = 0; i < count; ++i) {
    TokenMask mask;
    if (!masks.empty() && masks[i]) mask = {masks[i]->data(), static_cast<std::int64_t>(masks[i]->shape(0))};
    const Chosen chosen =
        samplers[i]->choose(kernels, logits.data() + rows.data()[i] * width, width, mask, scratch);
    tokens.data()[i] = chosen.token;
    best.data()[i] = chosen.best;
  }
}

void score_rows(Logits logits, Rows rows, Array<float, 1> best, Array<double, 1> totals, Array<std::int64_t, 2> ids,
                Array<float, 2> values, const std::string& isa) {
  const std::size_t count = rows.shape(0);
  require(best.shape(0) == count && totals.shape(0) == count && ids.shape(0) == count && values.shape(0) == count &&
              ids.shape(1) == values.shape(1) && ids.shape(1) <= logits.shape(1),
          "every row has a logit, a sum, and as many ids as values");
  require_rows(logits, rows);
  const Kernels& kernels = *find_kernels(choose_instruction_set(isa).c_str());
  nb::gil_scoped_release release;
  SamplingScratch scratch;
  const std::int64_t width = static_cast<std::int64_t>(logits.shape(1)), top = static_cast<std::int64_t>(ids.shape(1));
  for (std::size_t i = 0; i < count; ++i) {
    const bool finite = score_row(kernels, logits.data() + rows.data()[i] * width, width, top, best.data()[i],
                                  totals.data()[i], ids.data() + i * ids.shape(1), values.data() + i * ids.shape(1),
                                  scratch);
    if (!finite) totals.data()[i] = NAN;
  }
}

}  // namespace

void bind_sampling(nb::module_& module) {
  nb::class_<RowSampler>(module, "RowSampler", "Chooses the tokens of one answer (kernels/cpu/sampling/sampling.h).")
      .def("__init__",
           [](RowSampler* self, double factor, std::int64_t top_k, double top_p, float min_score, double typical_p,
              float repetition, float presence, float frequency, Rows bias_tokens, Vector biases, std::uint64_t seed,
              std::uint64_t choice) {
             new (self) RowSampler(make(factor, top_k, top_p, min_score, typical_p, repetition, presence, frequency,
                                        bias_tokens, biases, seed, choice));
           },
           nb::arg("factor"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_score"), nb::arg("typical_p"),
           nb::arg("repetition_penalty"), nb::arg("presence_penalty"), nb::arg("frequency_penalty"),
           nb::arg("bias_tokens").noconvert(), nb::arg("biases").noconvert(), nb::arg("seed"), nb::arg("choice"))
      .def("see", [](RowSampler& self, Rows ids) { self.see(ids.data(), static_cast<std::int64_t>(ids.shape(0))); },
           nb::arg("ids").noconvert(), "Tokens of the prompt, int64 (n,).")
      .def("copy", [](const RowSampler& self) { return RowSampler(self); }, "Another one that has chosen the same tokens.")
      .def_prop_ro("position", &RowSampler::position, "Tokens that were chosen.");
  module.def("keyed_uniform", &keyed_uniform, nb::arg("seed"), nb::arg("choice"), nb::arg("position"),
             "kbit.engine.randomness.KeyedUniform's number.");
  module.def("sample_rows", &sample_rows, nb::arg("samplers"), nb::arg("logits").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("masks"), nb::arg("tokens").noconvert(), nb::arg("best").noconvert(),
             nb::arg("isa") = "",
             "The next token of each sampler, from its row of logits (L, V). masks: bool (n,) or None for each, or no "
             "list. A token of -1: the largest logit, in best, is not finite.");
  module.def("score_rows", &score_rows, nb::arg("logits").noconvert(), nb::arg("rows").noconvert(),
             nb::arg("best").noconvert(), nb::arg("totals").noconvert(), nb::arg("ids").noconvert(),
             nb::arg("values").noconvert(), nb::arg("isa") = "",
             "Of rows of logits (L, V): the largest, the sum of e^(logit - largest), NaN if that is not finite, and "
             "the largest few, ids and logits (R, n), of equal ones the first.");
}

}  // namespace kbit
