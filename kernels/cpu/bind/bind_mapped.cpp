// Python bindings of prepared weights in files: MappedFile, and a Matrix's arrays on their way there and back.
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "codecs/mapped_file.h"
#include "codecs/matrix_storage.h"

namespace nb = nanobind;

namespace kbit {
namespace {

using ByteView = nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>, nb::c_contig>;

constexpr const char* kCodeNames[] = {"planes", "sum2", "sum4"};
constexpr const char* kNumberNames[] = {"fp16", "bf16", "fp32", "fp32-steps"};

// Names of files are bytes, which Python puts into text in its own way (os.fsdecode); so do texts with such names in them.
void raise_with_name(PyObject* type, const char* text) {
  nb::object message = nb::steal(PyUnicode_DecodeFSDefault(text));
  if (message.is_valid()) PyErr_SetObject(type, message.ptr());
}

// A view that keeps `owner` alive.
template <typename Owner> ByteView view_of(const std::uint8_t* begin, std::size_t size, std::shared_ptr<Owner> owner) {
  auto* kept = new std::shared_ptr<Owner>(std::move(owner));
  nb::capsule capsule(kept, [](void* p) noexcept { delete static_cast<std::shared_ptr<Owner>*>(p); });
  static const std::uint8_t nothing = 0;
  return ByteView(begin ? begin : &nothing, {size}, capsule);
}

std::shared_ptr<MatrixStorage> map_matrix(std::shared_ptr<MappedFile> file, std::int64_t rows, std::int64_t columns,
                                          int bits, std::int64_t block_size, const std::string& kind, bool offsets,
                                          const std::vector<std::uint64_t>& begins, const std::string& code,
                                          int window, std::int64_t mixed, bool apart, bool half,
                                          std::int64_t outliers) {
  require_sizes(rows, columns, block_size);
  if ((bits != 0 && (bits < 2 || bits > 8)) || block_size < 0 ||
      block_size % 16 || (apart && bits < 3) ||
      begins.size() != static_cast<std::size_t>(kPlainArrays + (apart ? bits - 2 : 0))) {
    throw std::invalid_argument("a prepared matrix cannot have this shape and width");
  }
  std::array<std::uint64_t, kArrays> places{};
  std::copy(begins.begin(), begins.end(), places.begin());
  const Code what = code_named(code);
  if (what != Code::planes && (kind != "fp16" || offsets || block_size != 0 || apart)) {
    throw std::invalid_argument("a trellis has one fp16 scale a row");
  }
  require_trellis(what, bits, half, window);
  require_mixed(mixed, columns);
  require(outliers >= 0 && (outliers == 0 || bits > 0) && outliers <= rows * columns,
          "there are not so many weights to keep apart");
  return MatrixStorage::mapped({rows, columns, bits, block_size, number_named(kind), offsets, what, window, mixed, apart, half,
                                outliers},
                               std::move(file), places);
}

}  // namespace

Code code_named(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == kCodeNames[i]) return static_cast<Code>(i);
  throw std::invalid_argument("a code is planes, sum2 or sum4");
}

void require_trellis(Code code, int bits, bool half, int window) {
  if (code == Code::planes) return require(!half, "only trellises have half a bit more");
  if (bits < 2 || bits + half > (code == Code::sum2 ? 2 : 6) || window < 8 || window > 16) {
    throw std::invalid_argument("a trellis has 2 to 6 bits (sum2: 2) and windows of 8 to 16");
  }
}

void require_mixed(std::int64_t mixed, std::int64_t columns) {
  if (mixed == 0) return;
  if (mixed < 16 || (mixed & (mixed - 1)) || (columns + 15) / 16 * 16 % mixed) {
    throw std::invalid_argument("mixed columns are a power of two from 16 on that divides a row of whole tiles");
  }
}

Number number_named(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kNumberNames[i]) return static_cast<Number>(i);
  throw std::invalid_argument("a number type is fp16, bf16, fp32 or fp32-steps");
}

void bind_mapped(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const FileChanged& error) {
      raise_with_name(nb::module_::import_("kbit.host.errors").attr("CheckpointError").ptr(), error.what());
    }
  });

  nb::class_<MappedFile>(module, "MappedFile", "A file of prepared weights; kernels/cpu/codecs/mapped_file.h.")
      .def("__init__",
           [](MappedFile* self, nb::object path) {
             PyObject* name = nullptr;
             if (!PyUnicode_FSConverter(path.ptr(), &name)) throw nb::python_error();
             const auto owner = nb::steal<nb::bytes>(name);
             try {
               new (self) MappedFile(std::string(owner.c_str(), owner.size()));
             } catch (const std::runtime_error& error) {
               raise_with_name(PyExc_OSError, error.what());
               throw nb::python_error();
             }
           },
           nb::arg("path"), nb::sig("def __init__(self, path: str) -> None"))
      .def_prop_ro("path",
                   [](const MappedFile& file) { return nb::steal<nb::str>(PyUnicode_DecodeFSDefault(file.path().c_str())); })
      .def("__len__", &MappedFile::size)
      .def("check", &MappedFile::check, "Raise CheckpointError where the file is no longer what was opened.")
      .def("prefetch", &MappedFile::prefetch, nb::arg("begin"), nb::arg("end"),
           "Ask the system to read bytes [begin, end) ahead.")
      .def("bytes",
           [](std::shared_ptr<MappedFile> file, std::uint64_t begin, std::uint64_t end) {
             if (begin > end || end > file->size()) throw std::invalid_argument("these bytes lie outside the file");
             const std::uint8_t* data = file->data();
             return view_of(data + begin, static_cast<std::size_t>(end - begin), std::move(file));
           },
           nb::arg("begin"), nb::arg("end"), "Bytes [begin, end), not copied: uint8.");

  module.def("describe_matrix",
             [](const MatrixStorage& matrix) {
               const Description& d = matrix.description();
               nb::dict found;
               found["rows"] = d.rows;
               found["columns"] = d.columns;
               found["bits"] = d.bits;
               found["block_size"] = d.block_size;
               found["kind"] = kNumberNames[static_cast<int>(d.kind)];
               found["offsets"] = d.offsets;
               found["apart"] = d.apart;
               found["code"] = kCodeNames[static_cast<int>(d.code)];
               found["window"] = d.window;
               found["mixed"] = d.mixed;
               found["half"] = d.half;
               found["outliers"] = d.outliers;
               return found;
             },
             nb::arg("matrix"), "What map_matrix wants to know of a prepared matrix.");
  module.def("matrix_arrays",
             [](std::shared_ptr<MatrixStorage> matrix) {
               nb::list found;
               const Matrix& m = matrix->matrix();
               const auto arrays = matrix->arrays();
               for (int i = 0; i < kPlainArrays + (m.apart ? m.bits - 2 : 0); ++i) {
                 const Bytes& bytes = arrays[static_cast<std::size_t>(i)];
                 found.append(view_of(bytes.begin, bytes.size, matrix));
               }
               return found;
             },
             nb::arg("matrix"), "A prepared matrix's arrays, not copied; empty ones where it has none.");
  module.def("map_matrix", &map_matrix, nb::arg("file"), nb::arg("rows"), nb::arg("columns"), nb::arg("bits"),
             nb::arg("block_size"), nb::arg("kind"), nb::arg("offsets"), nb::arg("begins"), nb::arg("code") = "planes",
             nb::arg("window") = 0, nb::arg("mixed") = 0, nb::arg("apart") = false, nb::arg("half") = false,
             nb::arg("outliers") = 0,
             "A matrix whose arrays lie in a file, each from one of `begins` on.");
}

}  // namespace kbit
