// Python binding of a pass: everything that Program.run relies on is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "attention/kv_pages.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "program/program.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Encoder = std::tuple<KVPages*, BlockTables, Array<const std::int32_t, 1>>;

using Slots = Array<const std::int32_t, 1>;
using States = std::tuple<std::vector<Array<float, 2>>, Slots, Slots>;

// None inside a tuple or a list becomes an array without anything behind it.
template <typename T>
void require_given(const T& array, const char* message) {
  require(array.is_valid(), message);
}

// The states of a pass: (slots, size) each, and those that every row's sequence reads and writes.
void take_states(const States& given, Pass& pass) {
  const auto& [arrays, before, after] = given;
  std::int64_t slots = 0;
  for (const Slots* each : {&before, &after}) require_given(*each, "None is no slots of states");
  for (const auto& array : arrays) {
    require_given(array, "None is no array of states");
    slots = static_cast<std::int64_t>(array.shape(0));
    require(array.shape(0) == arrays[0].shape(0), "all states have the same slots");
    pass.states.push_back({array.data(), static_cast<std::int64_t>(array.shape(1))});
  }
  pass.state_before = before.data();
  pass.state_after = after.data();
  require(before.shape(0) == after.shape(0), "every sequence has a slot before and one after");
  std::vector<bool> written(static_cast<std::size_t>(slots), false);
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    const std::int32_t sequence = pass.sequence[r];
    if (r > 0 && sequence == pass.sequence[r - 1]) continue;
    require(static_cast<std::size_t>(sequence) < before.shape(0), "a sequence has no states");
    const std::int32_t from = pass.state_before[sequence], to = pass.state_after[sequence];
    require(from >= -1 && from < slots && to >= 0 && to < slots && !written[static_cast<std::size_t>(to)],
            "a state's slot does not exist, or two sequences write to it");
    written[static_cast<std::size_t>(to)] = true;
  }
}

// What rows see besides the tokens up to themselves is in this pass, and no row sees less than one before it.
void require_seen(const Pass& pass) {
  std::int32_t end = 0;
  for (std::int64_t r = pass.rows - 1; r >= 0; --r) {
    const bool ends = r + 1 == pass.rows || pass.sequence[r + 1] != pass.sequence[r];
    end = ends ? pass.position[r] : end;
    require(pass.last_seen[r] >= pass.position[r] && pass.last_seen[r] <= end &&
                (ends || pass.last_seen[r] <= pass.last_seen[r + 1]),
            "a token sees others than those of this pass and before");
  }
}

// Every row's sequence has an encoder's text, and pages for it.
void require_texts(const Pass& pass, std::size_t tables, std::size_t lengths) {
  require(tables == lengths, "an encoder's tables and lengths have one row per sequence");
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    const std::int32_t sequence = pass.sequence[r];
    if (r > 0 && sequence == pass.sequence[r - 1]) continue;
    require(static_cast<std::size_t>(sequence) < lengths, "a sequence has no encoder's text");
    const std::int32_t length = pass.encoder.lengths[sequence];
    require(length >= 1 && (length - 1) / kPage < pass.encoder.table_stride, "a sequence has no encoder's text");
    for (std::int64_t i = 0; i <= (length - 1) / kPage; ++i) {
      const std::int32_t page = pass.encoder.tables[sequence * pass.encoder.table_stride + i];
      require(page >= 0 && page < pass.encoder.cache->count(), "an encoder's text lies outside its cache");
    }
  }
}

void run(Program& program, const Array<const std::int64_t, 1>& ids, const Array<const std::int32_t, 1>& sequence,
         const Array<const std::int32_t, 1>& positions, const Array<const float, 2>& cos, const Array<const float, 2>& sin,
         const Array<const std::int32_t, 1>& rope_row, KVPages& pages, const BlockTables& tables,
         const std::optional<Array<const std::int64_t, 1>>& logits_rows, const Array<float, 2>& out,
         const std::optional<Array<const std::int32_t, 1>>& last_seen, const std::optional<Encoder>& encoder,
         const std::optional<States>& states, const std::optional<Array<const std::int64_t, 1>>& types,
         const std::optional<Array<const float, 2>>& features, const std::optional<Array<const std::int32_t, 1>>& adapters) {
  Pass pass;
  const std::size_t rows = ids.shape(0);
  require(rows >= 1, "a pass has at least one row");
  require(sequence.shape(0) == rows && positions.shape(0) == rows && rope_row.shape(0) == rows,
          "ids, sequence, positions and rope_row have one value per row");
  require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1), "cos and sin have the same shape");
  pass.rows = static_cast<std::int64_t>(rows);
  pass.ids = ids.data();
  pass.sequence = sequence.data();
  pass.position = positions.data();
  pass.cos = cos.data();
  pass.sin = sin.data();
  pass.rope_row = rope_row.data();
  pass.table_half = static_cast<int>(cos.shape(1));
  pass.cache = &pages;
  pass.tables = tables.data();
  pass.table_stride = static_cast<std::int64_t>(tables.shape(1));
  for (std::size_t r = 0; r < rows; ++r) {
    require(rope_row.data()[r] >= 0 && static_cast<std::size_t>(rope_row.data()[r]) < cos.shape(0),
            "a row of the rotary tables does not exist");
  }
  require_pages(pages, tables, sequence.data(), positions.data(), rows);
  if (last_seen) {
    require(last_seen->shape(0) == rows, "last_seen has one value per row");
    pass.last_seen = last_seen->data();
    require_seen(pass);
  }
  if (types) {
    require(types->shape(0) == rows, "types has one value per row");
    pass.types = types->data();
  }
  if (features) {
    require(features->shape(0) == rows, "features has one row per row");
    pass.features = features->data();
    pass.feature_width = static_cast<std::int64_t>(features->shape(1));
  }
  if (adapters) {
    require(adapters->shape(0) == rows, "adapters has one value per row");
    pass.adapter = adapters->data();
  }
  if (states) take_states(*states, pass);
  if (encoder) {
    const auto& [cache, texts, lengths] = *encoder;
    require(cache != nullptr, "None is no cache of an encoder");
    require_given(texts, "None is no tables of an encoder");
    require_given(lengths, "None is no lengths of an encoder's texts");
    pass.encoder = {cache, texts.data(), static_cast<std::int64_t>(texts.shape(1)), lengths.data()};
    require_texts(pass, texts.shape(0), lengths.shape(0));
  }
  if (logits_rows) {
    pass.logits_rows = static_cast<std::int64_t>(logits_rows->shape(0));
    pass.logits_row = logits_rows->data();
    require(program.vocabulary() > 0, "the program has no head");
  }
  pass.out = out.data();
  const std::int64_t out_rows = logits_rows ? pass.logits_rows : pass.rows;
  const std::int64_t out_columns = logits_rows ? program.vocabulary() : program.hidden_width();
  require(static_cast<std::int64_t>(out.shape(0)) == out_rows && static_cast<std::int64_t>(out.shape(1)) == out_columns,
          "out has the wrong shape");
  nb::gil_scoped_release release;
  program.run(pass);
  program.check_files();
}

}  // namespace

void bind_pass(nb::class_<Program>& program) {
  program
      .def("run", &run, nb::arg("ids"), nb::arg("sequence"), nb::arg("positions"), nb::arg("cos"), nb::arg("sin"),
           nb::arg("rope_row"), nb::arg("pages"), nb::arg("tables"), nb::arg("logits_rows").none(), nb::arg("out"),
           nb::arg("last_seen") = nb::none(), nb::arg("encoder") = nb::none(), nb::arg("states") = nb::none(),
           nb::arg("types") = nb::none(), nb::arg("features") = nb::none(), nb::arg("adapters") = nb::none())
      .def("logits",
           [](Program& p, const Array<const float, 2>& hidden, const Array<float, 2>& out) {
             require(hidden.shape(0) == out.shape(0) && static_cast<std::int64_t>(hidden.shape(1)) == p.hidden_width() &&
                         static_cast<std::int64_t>(out.shape(1)) == p.vocabulary(),
                     "hidden states or logits have the wrong shape");
             nb::gil_scoped_release release;
             if (hidden.shape(0) > 0) p.logits(hidden.data(), static_cast<std::int64_t>(hidden.shape(0)), out.data());
             p.check_files();
           },
           nb::arg("hidden"), nb::arg("out"));
}

}  // namespace kbit
