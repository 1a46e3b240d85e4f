// Python bindings of the KV pages and, for tests, of one attention: KVPages and attention of kbit._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>
#include <variant>
#include <vector>

#include "attention/attention_plan.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "program/context.h"
#include "attention/kv_pages.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Result = nb::ndarray<nb::numpy, float, nb::ndim<3>>;

// Calls function(); a std::invalid_argument becomes kbit's UsageError, one line for the user.
template <typename Function>
void checked(Function&& function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(nb::module_::import_("kbit.host.errors").attr("UsageError").ptr(), error.what());
    throw nb::python_error();
  }
}

// One number for all layers, or one for each.
using PerLayer = std::variant<std::int64_t, std::vector<std::int64_t>>;

std::int64_t of_layer(const PerLayer& numbers, std::int64_t layer) {
  if (const auto* one = std::get_if<std::int64_t>(&numbers)) return *one;
  return std::get<std::vector<std::int64_t>>(numbers)[static_cast<std::size_t>(layer)];
}

// The heads of every layer.
std::vector<KVHeads> heads_of(std::int64_t layers, const PerLayer& kv_heads, const PerLayer& head_dim,
                              bool latent) {
  require(layers >= 1 && layers <= 1 << 20, "a cache needs at least 1 layer, head and feature");
  for (const PerLayer* numbers : {&kv_heads, &head_dim}) {
    const auto* each = std::get_if<std::vector<std::int64_t>>(numbers);
    require(!each || static_cast<std::int64_t>(each->size()) == layers, "heads are the same in all layers, or of each");
  }
  std::vector<KVHeads> found;
  for (std::int64_t i = 0; i < layers; ++i) {
    found.push_back({of_layer(kv_heads, i), of_layer(head_dim, i), latent});
    require(found.back().count <= 1 << 20 && found.back().dim <= 1 << 20, "a layer has at most 2^20 heads and features");
  }
  return found;
}

// A new zeroed array (a, b, c), owned by Python, and where its values are.
std::pair<Result, float*> make_array(std::size_t a, std::size_t b, std::size_t c) {
  float* data = new float[std::max<std::size_t>(1, a * b * c)]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {Result(data, {a, b, c}, owner), data};
}

std::pair<Result, Result> dequantized(const KVPages& cache, std::int64_t layer, const Array<const std::int32_t, 1>& table,
                                      std::int64_t length) {
  require(layer >= 0 && layer < cache.layers(), "the cache has no such layer");
  require(length >= 0 && length <= static_cast<std::int64_t>(table.shape(0)) * kPage, "a table has too few pages");
  for (std::int64_t i = 0; i < (length + kPage - 1) / kPage; ++i) {
    require(table.data()[i] >= 0 && table.data()[i] < cache.count(), "the cache has no such page");
  }
  const auto heads = static_cast<std::size_t>(cache.view(layer).kv_heads);
  const auto dim = static_cast<std::size_t>(cache.view(layer).head_dim);
  const auto tokens = static_cast<std::size_t>(length);
  auto [keys, key_data] = make_array(heads, tokens, dim);
  auto [values, value_data] = make_array(heads, tokens, dim);
  cache.dequantize(layer, table.data(), length, key_data, value_data);
  return {keys, values};
}

Result attention_once(Context& context, const Array<const float, 3>& q, const Array<const float, 3>& k, const Array<const float, 3>& v,
                      const Array<const std::int32_t, 1>& positions, const Array<const std::int32_t, 1>& sequence,
                      const Array<const float, 2>& cos, const Array<const float, 2>& sin, KVPages& cache, const BlockTables& tables,
                      std::int64_t layer, float scale, int window, const std::optional<Array<const float, 1>>& key_bias) {
  const std::size_t rows = q.shape(0), heads = q.shape(1), dim = q.shape(2), kv_heads = k.shape(1);
  const auto row_count = static_cast<std::int64_t>(rows);
  require(rows >= 1 && k.shape(0) == rows && v.shape(0) == rows && positions.shape(0) == rows &&
              sequence.shape(0) == rows && cos.shape(0) == sin.shape(0) && (key_bias || cos.shape(0) == rows),
          "q, k, v, positions, sequence, cos and sin have the same number of rows, at least 1");
  require(k.shape(2) == dim && v.shape(1) == kv_heads && v.shape(2) == dim && cos.shape(1) == sin.shape(1) &&
              2 * cos.shape(1) <= dim && kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0,
          "q (R, H, D), k and v (R, H_kv, D), cos and sin (R, up to D / 2) do not fit each other");
  require(layer >= 0 && layer < cache.layers() && window >= 0 &&
              static_cast<std::size_t>(cache.view(layer).kv_heads) == kv_heads &&
              static_cast<std::size_t>(cache.view(layer).head_dim) == dim,
          "the cache has other heads or no such layer, or the window is negative");
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int32_t where = sequence.data()[r], position = positions.data()[r];
    const bool follows = r > 0 && where == sequence.data()[r - 1];
    require(!follows || position == positions.data()[r - 1] + 1, "positions of a sequence must ascend by one");
  }
  require_pages(cache, tables, sequence.data(), positions.data(), rows);
  std::vector<std::int32_t> rope_row(rows);
  for (std::size_t r = 0; r < rows; ++r) rope_row[r] = key_bias ? positions.data()[r] : static_cast<std::int32_t>(r);
  const auto positions_end = std::int64_t{*std::max_element(positions.data(), positions.data() + rows)} + 1;
  require(!key_bias || (key_bias->shape(0) == kv_heads * dim &&
                        static_cast<std::int64_t>(cos.shape(0)) >= positions_end),
          "a key bias (H_kv D) comes with tables by position");
  auto [out, out_data] = make_array(rows, heads, dim);
  AttentionArgs args{};
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = out_data;
  args.q_stride = args.out_stride = static_cast<std::int64_t>(heads * dim);
  args.k_stride = args.v_stride = static_cast<std::int64_t>(kv_heads * dim);
  args.rows = row_count;
  args.sequence = sequence.data();
  args.position = positions.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.rope_row = rope_row.data();
  args.rotated_half = static_cast<int>(cos.shape(1));
  args.angle_stride = args.rotated_half;
  args.heads = static_cast<int>(heads);
  args.kv_heads = static_cast<int>(kv_heads);
  args.head_dim = static_cast<int>(dim);
  args.scale = scale;
  args.window = window;
  args.cache = &cache;
  args.tables = tables.data();
  args.table_stride = static_cast<std::int64_t>(tables.shape(1));
  args.layer = static_cast<int>(layer);
  AttentionScratch scratch;
  if (key_bias) {
    scratch.prepare_angles(args.cos, args.sin, args.rotated_half, positions_end);
    args.key_bias = key_bias->data();
    args.angles = scratch.angles();
  }
  scratch.prepare(row_count, args.sequence, args.position, args.heads, args.kv_heads, args.head_dim,
                  context.team->size());
  {
    nb::gil_scoped_release release;
    context.team->run([&](Worker& worker) { attention(context.kernels->attention, worker, args, scratch); });
  }
  return out;
}

}  // namespace

void require_pages(const KVPages& pages, const BlockTables& tables, const std::int32_t* sequence,
                   const std::int32_t* position, std::size_t rows) {
  const auto sequences = static_cast<std::int64_t>(tables.shape(0)), width = static_cast<std::int64_t>(tables.shape(1));
  for (std::size_t r = 0; r < rows; ++r) {
    require(sequence[r] >= 0 && sequence[r] < sequences && position[r] >= 0 && position[r] / kPage < width,
            "a token lies outside the cache");
    if (r + 1 < rows && sequence[r + 1] == sequence[r] && position[r + 1] > position[r]) continue;
    const std::int32_t* table = tables.data() + sequence[r] * width;
    for (int i = 0; i <= position[r] / kPage; ++i) {
      require(table[i] >= 0 && table[i] < pages.count(), "a token lies outside the cache");
    }
  }
}

void bind_kv_pages(nb::module_& module) {
  nb::class_<KVPages>(module, "KVPages", "Keys and values of every layer in pages; kernels/cpu/attention/kv_pages.h.")
      .def("__init__",
           [](KVPages* self, std::int64_t layers, const PerLayer& kv_heads, const PerLayer& head_dim,
              const std::string& kind, std::int64_t count, bool latent) {
             checked([&] { new (self) KVPages(heads_of(layers, kv_heads, head_dim, latent), kind, count); });
           },
           nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("kind"), nb::arg("count"),
           nb::arg("latent") = false,
           "kv_heads, head_dim: a number, or one for each layer. latent: keys are the values, too, and kept once.")
      .def_prop_ro("kind", &KVPages::kind)
      .def_prop_ro("count", &KVPages::count)
      .def_prop_ro("page_bytes", [](const KVPages& pages) { return pages.page_bytes(); })
      .def("resize", &KVPages::resize, nb::arg("count"), "Room for at least so many pages; those there stay.")
      .def("copy", &KVPages::copy, nb::arg("source"), nb::arg("target"), "Make page `target` the same as `source`.")
      .def("dump",
           [](const KVPages& pages, std::int64_t page) {
             return nb::bytes(pages.page(page), static_cast<std::size_t>(pages.page_bytes()));
           },
           nb::arg("page"), "The bytes of a page, as they are kept.")
      .def("load",
           [](KVPages& pages, std::int64_t page, const nb::bytes& data) {
             require(data.size() == static_cast<std::size_t>(pages.page_bytes()), "a page has another number of bytes");
             std::memcpy(pages.page(page), data.data(), data.size());
           },
           nb::arg("page"), nb::arg("data"), "Makes the bytes of a page those of `dump`.")
      .def("dequantized", &dequantized, nb::arg("layer"), nb::arg("table"), nb::arg("length"),
           "Keys and values of a sequence's first `length` tokens as attention understands them: two float32\n"
           "(H_kv, length, D). table: int32, its pages.");

  module.def(
      "kv_page_bytes",
      [](std::int64_t layers, const PerLayer& kv_heads, const PerLayer& head_dim, const std::string& kind, bool latent) {
        std::int64_t bytes = 0;
        checked([&] { bytes = KVPages::page_bytes(heads_of(layers, kv_heads, head_dim, latent), kind); });
        return bytes;
      },
      nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("kind"), nb::arg("latent") = false,
      "Bytes of one page.");

  module.def("attention", &attention_once, nb::arg("context"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
             nb::arg("positions"), nb::arg("sequence"), nb::arg("cos"), nb::arg("sin"), nb::arg("pages"),
             nb::arg("tables"), nb::arg("layer"), nb::arg("scale"), nb::arg("window") = 0, nb::arg("key_bias") = nb::none(),
             "One attention as a program runs it: q float32 (R, H, D), k and v (R, H_kv, D), positions and sequence\n"
             "int32 (R,), cos and sin (R, half) of each token (with a key_bias\n"
             "(H_kv D), which codes of keys leave out, of each position), tables int32 (B, pages of a sequence)\n"
             "-> (R, H, D).\n"
             "Writes k and v into the pages.");
}

}  // namespace kbit
