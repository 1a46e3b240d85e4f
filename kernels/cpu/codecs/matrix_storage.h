// Weight matrices in memory: from the portable layout (formats/bitplanes.py) to the one of matrix.h, once, at load.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

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
  std::vector<const std::uint8_t*> planes;       // (rows, ceil(columns * width / 8)) each, widest first
  const void* scales;                            // (rows, blocks)
  const void* offsets;                           // the same, or null
  Number scale_kind;
  const float* codebook;                         // 2^bits
};

class MatrixStorage {
 public:
  static std::shared_ptr<MatrixStorage> quantized(const QuantizedParts& parts, Team& team);
  // values: (rows, columns) row-major, in `kind`.
  static std::shared_ptr<MatrixStorage> dense(const void* values, std::int64_t rows, std::int64_t columns, Number kind,
                                              Team& team);

  const Matrix& matrix() const { return matrix_; }
  std::size_t nbytes() const { return data_.size() + scales_.size() + offsets_.size(); }

 private:
  void choose_levels();

  Matrix matrix_;
  AlignedBytes data_, scales_, offsets_;
  std::vector<float> codebook_;
  std::vector<std::int8_t> high_, low_;
};

}  // namespace kbit
