#include "codecs/matrix_storage.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

#include "codecs/bitplanes.h"
#include "codecs/scale_steps.h"

namespace kbit {
namespace {

// K types have fp32 scales (products of two numbers, exact) in blocks of 16 or 32.
bool steps_fit(Number kind, std::int64_t block_size) {
  return kind == Number::single && (block_size == 16 || block_size == 32);
}

}  // namespace

int integer_segment(std::int64_t block) {
  if (block == 0) return 64;
  for (int segment : {64, 32})
    if (block % segment == 0) return segment;
  return 16;
}

AlignedBytes::AlignedBytes(std::size_t bytes) : size_(bytes) {
  // calloc: the kernel's zero pages, so that memory that is written first costs no second pass.
  void* memory = std::calloc(bytes + 64, 1);
  if (memory == nullptr) throw std::bad_alloc();
  owner_.reset(static_cast<std::uint8_t*>(memory));
  data_ = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64);
}

void MatrixStorage::lay_out(const Description& what) {
  if (what.kind == Number::steps && (what.bits == 0 || !steps_fit(Number::single, what.block_size))) {
    throw std::invalid_argument("scales are steps in blocks of 16 or 32 only");
  }
  if (what.mixed && integer_segment(what.block_size) != 64) {  // rotated inputs are rounded by 64 columns (form_of)
    throw std::invalid_argument("rotated columns have scales for multiples of 64 of them, or one a row");
  }
  description_ = what;
  Matrix& m = matrix_;
  m.rows = what.rows;
  m.columns = what.columns;
  m.panels = (what.rows + kPanelRows - 1) / kPanelRows;
  m.tiles = (what.columns + kTileColumns - 1) / kTileColumns;
  m.bits = what.bits;
  m.apart = what.apart;
  if (what.bits == 0) {
    m.value_kind = what.kind;
    return;
  }
  m.scale_kind = what.kind;
  m.block = what.block_size ? what.block_size : m.tiles * kTileColumns;
  m.blocks = what.block_size ? (what.columns + what.block_size - 1) / what.block_size : 1;
  m.segment = integer_segment(what.block_size);
  m.code = what.code;
  m.half = what.half;
  m.window_mask = (std::int32_t{1} << what.window) - 1;
  m.mixed = what.mixed;
  m.outliers = what.outliers;
  if (what.kind == Number::steps) {
    const std::int64_t per_group = kStepColumns / m.block;
    m.group_shift = m.block == 16 ? 4 : 3;
    m.groups = (m.blocks + per_group - 1) / per_group;
    m.group_bytes = (4 + per_group) * kPanelRows;
  }
}

std::array<std::size_t, kArrays> MatrixStorage::sizes() const {
  const Matrix& m = matrix_;
  const std::int64_t number = bytes_of(description_.kind);
  if (m.bits == 0) return {static_cast<std::size_t>(m.panels * m.tiles * kTileWeights * number)};
  const bool steps = description_.kind == Number::steps;
  const std::size_t scales = static_cast<std::size_t>(steps ? m.panels * m.groups * m.group_bytes
                                                            : m.panels * m.blocks * kPanelRows * number);
  const auto plane = [&m](int bits) { return static_cast<std::size_t>(m.panels * m.tiles * kTileWeights / 8 * bits); };
  std::array<std::size_t, kArrays> found{
      m.apart ? plane(2) : static_cast<std::size_t>(m.panels * m.panel_bytes()), scales,
      description_.offsets ? scales : 0,
      sizeof(float) * (codebook_size() + rotation_size() + 3 * static_cast<std::size_t>(m.outliers))};
  for (int i = 0; m.apart && i < m.bits - 2; ++i) found[static_cast<std::size_t>(kPlainArrays + i)] = plane(1);
  return found;
}

std::size_t MatrixStorage::codebook_size() const {
  return matrix_.bits && matrix_.code == Code::planes ? std::size_t{1} << matrix_.bits : 0;
}

std::size_t MatrixStorage::rotation_size() const {
  return matrix_.mixed ? static_cast<std::size_t>((matrix_.columns + 15) / 16 * 16) : 0;
}

std::size_t MatrixStorage::nbytes() const {
  const auto bytes = sizes();
  return std::accumulate(bytes.begin(), bytes.end(), std::size_t{0}) - bytes[3];
}

std::size_t MatrixStorage::size_of(const Description& what) {
  MatrixStorage matrix;
  matrix.lay_out(what);
  return matrix.nbytes();
}

std::array<Bytes, kArrays> MatrixStorage::arrays() const {
  const Matrix& m = matrix_;
  const void* begins[kArrays] = {m.bits ? m.codes : m.values, m.scales, m.offsets, m.codebook};
  std::copy(m.further, m.further + kFurtherBits, begins + kPlainArrays);
  const auto bytes = sizes();
  std::array<Bytes, kArrays> found;
  for (std::size_t i = 0; i < kArrays; ++i) found[i] = {static_cast<const std::uint8_t*>(begins[i]), bytes[i]};
  return found;
}

std::shared_ptr<MatrixStorage> MatrixStorage::mapped(const Description& what, std::shared_ptr<const MappedFile> file,
                                                     const std::array<std::uint64_t, kArrays>& offsets) {
  auto storage = std::make_shared<MatrixStorage>();
  storage->lay_out(what);
  const auto bytes = storage->sizes();
  const std::uint8_t* begins[kArrays] = {};
  for (std::size_t i = 0; i < kArrays; ++i) {
    if (bytes[i] == 0) continue;
    if (offsets[i] % 64 || offsets[i] > file->size() || bytes[i] > file->size() - offsets[i]) {
      throw std::invalid_argument("an array of a prepared matrix lies outside its file");
    }
    begins[i] = file->data() + offsets[i];
  }
  Matrix& m = storage->matrix_;
  if (m.bits == 0) {
    m.values = begins[0];
  } else {
    m.codes = begins[0];
    m.scales = begins[1];
    m.offsets = begins[2];
    std::copy(begins + kPlainArrays, begins + kArrays, m.further);
    storage->codebook_.resize(bytes[3] / sizeof(float));
    if (bytes[3] > 0) std::memcpy(storage->codebook_.data(), begins[3], bytes[3]);
    storage->point_at_codebook();
  }
  storage->file_ = std::move(file);
  return storage;
}

std::shared_ptr<MatrixStorage> MatrixStorage::selection(std::shared_ptr<const MatrixStorage> whole, std::int64_t panels) {
  if (panels < 1 || panels > whole->matrix_.panels) throw std::invalid_argument("there are not so many panels");
  Description part = whole->description_;
  part.rows = panels * kPanelRows;
  auto storage = std::make_shared<MatrixStorage>();
  storage->lay_out(part);
  const auto bytes = storage->sizes();
  storage->data_ = AlignedBytes(bytes[0]);
  storage->scales_ = AlignedBytes(bytes[1]);
  storage->offsets_ = AlignedBytes(bytes[2]);
  Matrix& m = storage->matrix_;
  (m.bits ? reinterpret_cast<const void*&>(m.codes) : m.values) = storage->data_.data();
  m.scales = bytes[1] ? storage->scales_.data() : nullptr;
  m.offsets = bytes[2] ? storage->offsets_.data() : nullptr;
  for (std::size_t i = 0; i < kFurtherBits; ++i) {
    if (bytes[kPlainArrays + i] == 0) continue;
    storage->further_[i] = AlignedBytes(bytes[kPlainArrays + i]);
    m.further[i] = storage->further_[i].data();
  }
  storage->codebook_ = whole->codebook_;
  storage->panel_of_.resize(static_cast<std::size_t>(panels));
  m.panel_of = storage->panel_of_.data();
  storage->whole_ = std::move(whole);
  if (m.bits) storage->point_at_codebook();
  for (std::int64_t place = 0; place < panels; ++place) storage->take(place, 0);
  return storage;
}

void MatrixStorage::take(std::int64_t place, std::int64_t panel) {
  if (!whole_ || place < 0 || place >= matrix_.panels || panel < 0 || panel >= whole_->matrix_.panels) {
    throw std::invalid_argument("there is no such panel, or no such place for it");
  }
  const auto from = whole_->arrays(), to = arrays();
  for (std::size_t i = 0; i < kArrays; ++i) {
    if (i == 3 || to[i].size == 0) continue;  // (the codebook is the whole's)
    const std::size_t bytes = to[i].size / static_cast<std::size_t>(matrix_.panels);
    std::memcpy(const_cast<std::uint8_t*>(to[i].begin) + static_cast<std::size_t>(place) * bytes,
                from[i].begin + static_cast<std::size_t>(panel) * bytes, bytes);
  }
  panel_of_[static_cast<std::size_t>(place)] = static_cast<std::int32_t>(panel);
}

std::shared_ptr<MatrixStorage> MatrixStorage::quantized(const QuantizedParts& parts, Team& team) {
  auto storage = std::make_shared<MatrixStorage>();
  storage->lay_out({parts.rows, parts.columns, parts.bits, parts.block_size, parts.scale_kind, parts.offsets != nullptr,
                    Code::planes, 0, parts.mixed, parts.apart});
  Matrix& m = storage->matrix_;
  const auto bytes = storage->sizes();
  storage->data_ = AlignedBytes(bytes[0]);
  m.codes = storage->data_.data();
  for (int i = 0; parts.apart && i < parts.bits - 2; ++i) {
    storage->further_[i] = AlignedBytes(bytes[static_cast<std::size_t>(kPlainArrays + i)]);
    m.further[i] = storage->further_[i].data();
  }
  if (!storage->take_steps(parts, team)) storage->take_numbers(parts, team);
  m.scales = storage->scales_.data();
  m.offsets = parts.offsets ? storage->offsets_.data() : nullptr;
  storage->codebook_.assign(parts.codebook, parts.codebook + (std::size_t{1} << m.bits));
  storage->take_rotation(parts.signs);
  storage->point_at_codebook();
  storage->take_codes(parts, team);
  return storage;
}

// Codes from planes of whole rows to those of tiles.
void MatrixStorage::take_codes(const QuantizedParts& parts, Team& team) {
  const Matrix& m = matrix_;
  const auto coded = static_cast<std::size_t>(coded_columns(m.columns, m.mixed));
  struct Plane {
    int width;
    std::uint8_t* target;            // of the first tile
    std::int64_t tile_bytes, at;     // of all that lies together there; of this plane in half a tile
  };
  std::vector<Plane> planes;
  if (m.apart) {
    planes.push_back({2, data_.data(), kTileWeights / 4, 0});
    for (int i = 0; i < m.bits - 2; ++i) planes.push_back({1, further_[i].data(), kTileWeights / 8, 0});
  } else {
    std::int64_t at = 0;
    for (int width = 8; width > 0; width /= 2) {
      if (!(m.bits & width)) continue;
      planes.push_back({width, data_.data(), m.tile_bytes(), at});
      at += kTileWeights / 16 * width;
    }
  }
  team.run([&](Worker& worker) {
    // One row's codes as bytes, padded to whole tiles.
    std::vector<std::uint8_t> row_codes(static_cast<std::size_t>(m.tiles * kTileColumns));
    worker.for_each(m.panels, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin * kPanelRows; row < std::min(end * kPanelRows, m.rows); ++row) {
        const std::int64_t panel = row / kPanelRows, lane = row % kPanelRows;
        for (std::size_t i = 0; i < planes.size(); ++i) {
          const Plane& to = planes[i];
          const unsigned width = static_cast<unsigned>(to.width);
          const std::size_t row_bytes = plane_row_bytes(coded, width);
          unpack_plane(parts.planes[i] + static_cast<std::size_t>(row) * row_bytes, 1, coded, width, 0, true,
                       row_codes.data());
          // Four codes at a time: the 32-bit word that belongs to this row in a quad's vector.
          const int fields = 8 / to.width;
          for (std::int64_t tile = 0; tile < m.tiles; ++tile) {
            std::uint8_t* plane = to.target + (panel * m.tiles + tile) * to.tile_bytes + to.at;
            for (int quad = 0; quad < kTileColumns / 4; ++quad) {
              std::uint32_t four, word;
              std::memcpy(&four, row_codes.data() + tile * kTileColumns + quad * 4, 4);
              std::uint8_t* at = plane + quad / 8 * to.tile_bytes / 2 + quad % 8 / fields * 64 + lane * 4;
              std::memcpy(&word, at, 4);
              word |= four << (quad % fields * to.width);
              std::memcpy(at, &word, 4);
            }
          }
        }
      }
    });
  });
}

// Scales and offsets as the numbers they are.
void MatrixStorage::take_numbers(const QuantizedParts& parts, Team& team) {
  const Matrix& m = matrix_;
  const std::size_t number = static_cast<std::size_t>(bytes_of(m.scale_kind));
  const auto take = [&](const void* source, AlignedBytes& target) {
    if (source == nullptr) return;
    target = AlignedBytes(static_cast<std::size_t>(m.panels * m.blocks * kPanelRows) * number);
    const auto* from = static_cast<const std::uint8_t*>(source);
    team.run([&](Worker& worker) {
      worker.for_each(m.rows, 64, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          for (std::int64_t block = 0; block < m.blocks; ++block) {
            const std::int64_t at = (row / kPanelRows * m.blocks + block) * kPanelRows + row % kPanelRows;
            std::memcpy(target.data() + static_cast<std::size_t>(at) * number,
                        from + static_cast<std::size_t>(row * m.blocks + block) * number, number);
          }
        }
      });
    });
  };
  take(parts.scales, scales_);
  take(parts.offsets, offsets_);
}

// The same as steps, if all of them are: false, and nothing changed, where one is not.
bool MatrixStorage::take_steps(const QuantizedParts& parts, Team& team) {
  if (!steps_fit(parts.scale_kind, parts.block_size)) return false;
  const Description numbers = description_;
  Description steps = numbers;
  steps.kind = Number::steps;
  lay_out(steps);
  const Matrix& m = matrix_;
  const std::int64_t per_group = kStepColumns / m.block;
  const auto take = [&](const void* source, AlignedBytes& target) {
    if (source == nullptr) return true;
    AlignedBytes taken(static_cast<std::size_t>(m.panels * m.groups * m.group_bytes));
    std::atomic<bool> exact{true};
    team.run([&](Worker& worker) {
      worker.for_each(m.rows, 64, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end && exact; ++row) {
          const float* numbers = static_cast<const float*>(source) + row * m.blocks;
          for (std::int64_t group = 0; group < m.groups; ++group) {
            const int count = static_cast<int>(std::min(per_group, m.blocks - group * per_group));
            float size;
            std::int8_t steps[kStepColumns / 16];
            if (!find_steps(numbers + group * per_group, count, &size, steps)) {
              exact = false;
              break;
            }
            std::uint8_t* at = taken.data() + (row / kPanelRows * m.groups + group) * m.group_bytes;
            const std::int64_t lane = row % kPanelRows;
            std::memcpy(at + 4 * lane, &size, 4);
            for (int i = 0; i < count; ++i)
              at[(4 + i) * kPanelRows + lane] = static_cast<std::uint8_t>(steps[i]);
          }
        }
      });
    });
    if (exact) target = std::move(taken);
    return exact.load();
  };
  if (take(parts.scales, scales_) && take(parts.offsets, offsets_)) return true;
  scales_ = AlignedBytes();
  lay_out(numbers);
  return false;
}

// Appends the rotation to the codebook: signs over the square root of what is mixed.
void MatrixStorage::take_rotation(const std::uint8_t* signs) {
  if (matrix_.mixed == 0) return;
  const float size = 1.0f / std::sqrt(static_cast<float>(matrix_.mixed));
  for (std::int64_t k = 0; k < (matrix_.columns + 15) / 16 * 16; ++k)
    codebook_.push_back(signs[k / 8] >> (k % 8) & 1 ? -size : size);
}

void MatrixStorage::point_at_codebook() {
  matrix_.codebook = codebook_.data();
  if (matrix_.mixed) matrix_.rotation = codebook_.data() + codebook_size();
  if (matrix_.outliers) point_at_outliers();
  if (matrix_.code == Code::planes) choose_levels();
}

std::shared_ptr<MatrixStorage> MatrixStorage::trellis(const TrellisParts& parts, Team& team) {
  auto storage = std::make_shared<MatrixStorage>();
  storage->lay_out({parts.rows, parts.columns, parts.bits, 0, Number::half, false, parts.code, parts.window, parts.mixed,
                    false, parts.half});
  Matrix& m = storage->matrix_;
  storage->data_ = AlignedBytes(storage->sizes()[0]);
  storage->scales_ = AlignedBytes(storage->sizes()[1]);
  m.codes = storage->data_.data();
  m.scales = storage->scales_.data();
  std::memcpy(storage->scales_.data(), parts.scales, static_cast<std::size_t>(parts.rows) * 2);
  storage->take_rotation(parts.signs);
  storage->point_at_codebook();
  const std::int64_t tiles = (parts.columns + 15) / 16, row_bytes = 2 * parts.bits + parts.half;
  std::uint8_t* codes = storage->data_.data();
  team.run([&](Worker& worker) {
    worker.for_each(m.panels, 1, [&](std::int64_t panel, std::int64_t) {
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::uint8_t* from = parts.codes + (panel * tiles + tile) * 16 * row_bytes;
        std::uint8_t* to = codes + panel * m.panel_bytes() + tile * 16 * row_bytes;
        for (int row = 0; row < kPanelRows; ++row) {
          for (int word = 0; word < parts.bits; ++word) {
            const std::uint8_t* high = from + row * row_bytes + 2 * word;
            const std::uint16_t value = static_cast<std::uint16_t>(high[0] << 8 | high[1]);
            const bool alone = parts.bits % 2 && word == parts.bits - 1;
            std::memcpy(to + word / 2 * 64 + (alone ? 2 * row : 4 * row + (word % 2 ? 0 : 2)), &value, 2);
          }
          if (parts.half) to[16 * (row_bytes - 1) + row] = from[(row + 1) * row_bytes - 1];
        }
      }
    });
  });
  return storage;
}

std::shared_ptr<MatrixStorage> MatrixStorage::dense(const void* values, std::int64_t rows, std::int64_t columns,
                                                    Number kind, Team& team) {
  auto storage = std::make_shared<MatrixStorage>();
  storage->lay_out({rows, columns, 0, 0, kind, false});
  Matrix& m = storage->matrix_;
  const std::int64_t padded = m.tiles * kTileColumns;
  storage->data_ = AlignedBytes(storage->sizes()[0]);
  m.values = storage->data_.data();
  auto transpose = [&]<typename Value>(const Value* from, Value* to) {
    team.run([&](Worker& worker) {
      worker.for_each(m.panels, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t panel = begin; panel < end; ++panel) {
          const std::int64_t lanes = std::min<std::int64_t>(kPanelRows, rows - panel * kPanelRows);
          const Value* source = from + panel * kPanelRows * columns;
          Value* target = to + panel * padded * kPanelRows;
          for (std::int64_t k = 0; k < columns; ++k)
            for (std::int64_t lane = 0; lane < lanes; ++lane) target[k * kPanelRows + lane] = source[lane * columns + k];
        }
      });
    });
  };
  if (kind == Number::single) {
    transpose(static_cast<const std::uint32_t*>(values), reinterpret_cast<std::uint32_t*>(storage->data_.data()));
  } else {
    transpose(static_cast<const std::uint16_t*>(values), reinterpret_cast<std::uint16_t*>(storage->data_.data()));
  }
  return storage;
}

}  // namespace kbit
