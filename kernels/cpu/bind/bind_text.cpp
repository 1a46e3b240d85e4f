// Python bindings of byte-pair encoding: BytePairs of kbit._native. Tables are anything with a buffer of bytes (slices of
// a memory map); they are read in place and kept alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "bind/bind.h"
#include "text/byte_pairs.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::uint8_t> span(const Bytes& bytes) { return {bytes.data(), bytes.shape(0)}; }

std::string_view characters(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.shape(0)};
}

class MappedBytePairs {
 public:
  MappedBytePairs(Bytes texts, Bytes ends, Bytes token_slots, Bytes merges, Bytes merge_slots, bool ignore_merges)
      : kept_{texts, ends, token_slots, merges, merge_slots},
        pairs_({characters(texts), Numbers(span(ends)), Numbers(span(token_slots)), Numbers(span(merges)),
                Numbers(span(merge_slots))},
               ignore_merges) {}

  std::size_t size() const { return pairs_.size(); }

  std::optional<std::uint32_t> find(std::string_view token) const { return pairs_.find(token); }

  nb::object text(std::int64_t id) const {
    if (id < 0 || static_cast<std::size_t>(id) >= pairs_.size()) return nb::none();
    const std::string_view token = pairs_.text(static_cast<std::uint32_t>(id));
    PyObject* text = PyUnicode_DecodeUTF8(token.data(), static_cast<Py_ssize_t>(token.size()), nullptr);
    if (text == nullptr) throw nb::python_error();
    return nb::steal(text);
  }

  // A word is a run of ids with the same number; an id without one (None) stands by itself.
  std::vector<std::uint32_t> encode(const std::vector<std::uint32_t>& ids, const std::vector<std::optional<std::uint32_t>>& words) {
    if (ids.size() != words.size()) throw std::invalid_argument("each id has its word");
    std::vector<std::uint32_t> out;
    for (std::size_t start = 0, stop; start < ids.size(); start = stop) {
      for (stop = start + 1; stop < ids.size() && words[start] && words[stop] == words[start]; ++stop) {
      }
      if (stop - start == 1) {
        out.push_back(ids[start]);
      } else {
        pairs_.encode(std::span(ids).subspan(start, stop - start), out);
      }
    }
    return out;
  }

 private:
  std::vector<Bytes> kept_;
  BytePairs pairs_;
};

}  // namespace

void bind_text(nb::module_& module) {
  nb::class_<MappedBytePairs>(module, "BytePairs", "A byte-pair vocabulary in tables (kernels/cpu/text/byte_pairs.h).")
      .def(nb::init<Bytes, Bytes, Bytes, Bytes, Bytes, bool>(), nb::arg("texts").noconvert(), nb::arg("ends").noconvert(),
           nb::arg("token_slots").noconvert(), nb::arg("merges").noconvert(), nb::arg("merge_slots").noconvert(),
           nb::arg("ignore_merges"))
      .def("__len__", &MappedBytePairs::size)
      .def("token_to_id", &MappedBytePairs::find, nb::arg("token"))
      .def("id_to_token", &MappedBytePairs::text, nb::arg("token_id"), nb::sig("def id_to_token(self, token_id: int) -> str | None"))
      .def("encode", &MappedBytePairs::encode, nb::arg("ids"), nb::arg("words"),
           "Ids of characters, and the number of the word each belongs to, to the ids of tokens.");
  module.def("fill_token_slots",
             [](const Bytes& texts, const Bytes& ends, const WritableBytes& slots) {
               fill_token_slots(characters(texts), Numbers(span(ends)), {slots.data(), slots.shape(0)});
             },
             nb::arg("texts").noconvert(), nb::arg("ends").noconvert(), nb::arg("slots").noconvert());
  module.def("fill_merge_slots",
             [](const Bytes& merges, const WritableBytes& slots) {
               fill_merge_slots(Numbers(span(merges)), {slots.data(), slots.shape(0)});
             },
             nb::arg("merges").noconvert(), nb::arg("slots").noconvert());
}

}  // namespace kbit
