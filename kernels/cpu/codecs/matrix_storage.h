// Weight matrices in memory: from the portable layout (formats/bitplanes.py) to the one of matrix.h, once, at load.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "codecs/mapped_file.h"
#include "codecs/matrix.h"
#include "program/threads.h"

namespace kbit {

// 64-byte aligned memory that starts as zeros and is not touched before it is used.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(std::size_t bytes);
  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::unique_ptr<std::uint8_t, void (*)(void*)> owner_{nullptr, std::free};
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// The stored parts of a quantized matrix. Pointers are only read during the call.
struct QuantizedParts {
  std::int64_t rows, columns;
  int bits;
  std::int64_t block_size;                       // columns per scale; 0: one scale per row
  std::vector<const std::uint8_t*> planes;       // (rows, ceil(coded_columns * width / 8)), widest first
  const void* scales;                            // (rows, blocks)
  const void* offsets;                           // the same, or null
  Number scale_kind;
  const float* codebook;                         // 2^bits
  // Nested: planes are of 2 bits, then of 1 for each further bit, and are kept apart.
  bool apart = false;
  std::int64_t mixed = 0;                        // of rotated columns (Matrix::mixed)
  const std::uint8_t* signs = nullptr;           // a bit a column, in whole bytes for every 16 columns
};

// Columns that have codes: where they are rotated, those of whole tiles of 16.
constexpr std::int64_t coded_columns(std::int64_t columns, std::int64_t mixed) {
  return mixed ? (columns + 15) / 16 * 16 : columns;
}

// The same of a trellis.
struct TrellisParts {
  std::int64_t rows, columns;
  int bits;
  Code code;
  int window;
  const std::uint8_t* codes;   // (row tiles, column tiles, 32 bits; 16 more with half a bit)
  const std::uint16_t* scales; // (rows), fp16
  std::int64_t mixed;
  const std::uint8_t* signs;
  bool half = false;
};

// What a prepared matrix is, apart from its arrays: enough to find them again in a file.
struct Description {
  std::int64_t rows, columns;
  int bits;                 // 0: dense
  std::int64_t block_size;  // as in QuantizedParts
  Number kind;              // of the scales as they are kept, or of dense values
  bool offsets;
  Code code = Code::planes;
  int window = 0;           // of a trellis
  std::int64_t mixed = 0;   // columns that one Hadamard matrix mixes; 0: not rotated
  bool apart = false;       // nested codes of 3 bits or more
  bool half = false;        // of a trellis: half a bit more
  std::int64_t outliers = 0;  // weights kept apart
};

// A prepared matrix's arrays: data, scales, offsets, codebook (where there are codes of one, with the rotation behind it, and
// behind that the rows, columns and values of outliers), then the streams of further bits.
constexpr int kPlainArrays = 4, kArrays = kPlainArrays + kFurtherBits;
struct Bytes {
  const std::uint8_t* begin = nullptr;
  std::size_t size = 0;
};

// Columns that int8 products sum as integers, for codes with a scale every `block` columns (0: one per row).
int integer_segment(std::int64_t block);

class MatrixStorage {
 public:
  static std::shared_ptr<MatrixStorage> quantized(const QuantizedParts& parts, Team& team);
  static std::shared_ptr<MatrixStorage> trellis(const TrellisParts& parts, Team& team);
  // values: (rows, columns) row-major, in `kind`.
  static std::shared_ptr<MatrixStorage> dense(const void* values, std::int64_t rows, std::int64_t columns, Number kind,
                                              Team& team);

  // A matrix whose arrays lie in a mapped file, as `arrays` once gave them; where each begins.
  // Throws std::invalid_argument: an array lies outside the file, or is not aligned to 64 bytes.
  static std::shared_ptr<MatrixStorage> mapped(const Description& what, std::shared_ptr<const MappedFile> file,
                                               const std::array<std::uint64_t, kArrays>& offsets);

  // Room for some panels of a matrix, all of them its first until `take` is called.
  static std::shared_ptr<MatrixStorage> selection(std::shared_ptr<const MatrixStorage> whole, std::int64_t panels);
  // Copies a panel of the matrix this is a selection of. Throws std::invalid_argument: it is none, or there is no such
  // place or panel.
  void take(std::int64_t place, std::int64_t panel);

  // Weights to keep apart from the codes, (count) each, rows ascending. To be called once, before the matrix is used.
  // Throws std::invalid_argument: there are no codes, or no such weights.
  void keep_apart(const std::int32_t* rows, const std::int32_t* columns, const float* values, std::int64_t count);

  const Matrix& matrix() const { return matrix_; }
  const Description& description() const { return description_; }
  std::array<Bytes, kArrays> arrays() const;
  std::size_t nbytes() const;
  // Of a matrix that is not there yet.
  static std::size_t size_of(const Description& what);
  // The file the arrays lie in, or null.
  const std::shared_ptr<const MappedFile>& file() const { return file_; }

 private:
  // Everything about the matrix but the pointers. Throws std::invalid_argument: rotated columns with other blocks than of
  // multiples of 64, steps with others than of 16 or 32.
  void lay_out(const Description& what);
  // Bytes each array has.
  std::array<std::size_t, kArrays> sizes() const;
  std::size_t codebook_size() const;  // floats
  std::size_t rotation_size() const;  // floats
  void choose_levels();
  void take_rotation(const std::uint8_t* signs);
  void point_at_codebook();
  void point_at_outliers();
  void take_numbers(const QuantizedParts& parts, Team& team);
  bool take_steps(const QuantizedParts& parts, Team& team);

  Description description_{};
  Matrix matrix_;
  void take_codes(const QuantizedParts& parts, Team& team);

  AlignedBytes data_, scales_, offsets_, further_[kFurtherBits];
  std::shared_ptr<const MappedFile> file_;
  std::shared_ptr<const MatrixStorage> whole_;  // of a selection
  std::vector<float> codebook_;
  std::vector<std::int32_t> outlier_places_;  // rows, then columns
  std::vector<std::int32_t> panel_of_;        // of a selection
  std::vector<std::int8_t> high_, low_;
};

}  // namespace kbit
