// Weights that are kept apart from a matrix's codes (kbit/formats/outlier_weights.py).
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "codecs/matrix_storage.h"

namespace kbit {

void MatrixStorage::keep_apart(const std::int32_t* rows, const std::int32_t* columns, const float* values,
                               std::int64_t count) {
  if (matrix_.bits == 0 || matrix_.outliers || file_ || whole_) {
    throw std::invalid_argument("weights are kept apart from codes, once");
  }
  if (count == 0) return;
  const auto size = static_cast<std::size_t>(count);
  std::vector<float> apart(3 * size);  // the bits of rows and columns, and values
  std::memcpy(apart.data(), rows, size * 4);
  std::memcpy(apart.data() + size, columns, size * 4);
  std::memcpy(apart.data() + 2 * size, values, size * 4);
  codebook_.insert(codebook_.end(), apart.begin(), apart.end());
  matrix_.outliers = description_.outliers = count;
  point_at_codebook();
}

void MatrixStorage::point_at_outliers() {
  Matrix& m = matrix_;
  const auto count = static_cast<std::size_t>(m.outliers);
  const float* apart = codebook_.data() + codebook_size() + rotation_size();
  outlier_places_.resize(2 * count);
  std::memcpy(outlier_places_.data(), apart, 2 * count * sizeof(float));
  m.outlier_rows = outlier_places_.data();
  m.outlier_columns = m.outlier_rows + count;
  m.outlier_values = apart + 2 * count;
  const std::int64_t rows = whole_ ? whole_->matrix_.rows : m.rows;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t row = m.outlier_rows[i], column = m.outlier_columns[i];
    if (row < (i ? m.outlier_rows[i - 1] : 0) || row >= rows || column < 0 || column >= m.columns ||
        !std::isfinite(m.outlier_values[i])) {
      throw std::invalid_argument("a matrix has no such weights to keep apart");
    }
  }
}

}  // namespace kbit
