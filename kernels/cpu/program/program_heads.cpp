// Products by heads: every head's features with its own rows of a matrix, onward or with the transposed rows. Latent
// attention's queries go the one way to the width of what the cache keeps, and what it made of that comes back the other.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "program/program_scratch.h"

namespace kbit {
namespace {

// As in program_matmul.cpp.
constexpr std::int64_t kRowBlock = 256, kFewRows = 64;

// Tiles of columns that one piece of a product with transposed rows has.
constexpr std::int64_t kPieceTiles = 2;

}  // namespace

void Program::check(const HeadsInstruction& h) const {
  const bool one = h.heads >= 1 && h.first >= 0 && h.product.weights.size() == 1 && h.x != h.out;
  if (!one || h.product.weights[0]->matrix().rows % h.heads) {
    throw std::invalid_argument("a product by heads has one matrix, with as many rows for every head");
  }
  const Matrix& w = h.product.weights[0]->matrix();
  const std::int64_t rows = w.rows / h.heads, before = h.first;
  const std::int64_t in = before + (h.backward ? rows : w.columns), out = h.backward ? before + w.columns : rows;
  if (rows % kPanelRows || w.columns % kPanelRows || (h.backward && rows > kBackwardPanels * kPanelRows)) {
    throw std::invalid_argument("a product by heads takes multiples of 16 features, and at most 1024 rows of each");
  }
  if (buffer_width(h.x) != h.heads * in || buffer_width(h.out) != h.heads * out) {
    throw std::invalid_argument("a product by heads does not fit its buffers");
  }
}

void Program::multiply_heads(Worker& worker, const HeadsInstruction& h, std::int64_t rows) {
  const Buffer &x = buffers_[static_cast<std::size_t>(h.x)], &out = buffers_[static_cast<std::size_t>(h.out)];
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const Matrix& w = h.product.weights[0]->matrix();
  const std::int64_t columns = w.columns, width = padded(columns), made = w.rows / h.heads, has = x.width / h.heads;
  float* input = reinterpret_cast<float*>(heads_input_.data());
  // Rows of a head one after another, as products take them.
  worker.for_each(rows * h.heads, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* from = x.data() + i % rows * x.stride + i / rows * has + h.first;
      std::copy(from, from + columns, input + i * width);
      std::fill(input + i * width + columns, input + (i + 1) * width, 0.0f);
    }
    prepare_rows(h.product, *shared_, input, width, nullptr, begin, end);
  });
  const std::int64_t panels = made / kPanelRows, block = std::min(rows, kRowBlock), blocks = (rows + block - 1) / block;
  const std::int64_t units = h.heads * blocks * panels;
  std::int64_t grain = 2;
  if (rows <= kFewRows) {  // as in Program::matmul
    const std::int64_t bytes = w.bits ? w.panel_bytes() : w.tiles * kTileWeights * bytes_of(w.value_kind);
    grain = std::clamp<std::int64_t>((256 << 10) / std::max<std::int64_t>(1, bytes), 1,
                                     (units + worker.size() - 1) / worker.size());
  }
  grain = std::clamp<std::int64_t>(kStaging / (block * kPanelRows), 1, grain);
  worker.for_each(units, grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t head = begin / (blocks * panels), row = head * rows + begin / panels % blocks * block;
      const std::int64_t panel = begin % panels, stop = std::min(panels, panel + end - begin);
      // Where row 0 of all rows and panel 0 of all panels would go.
      float* to = out.data() + head * made - head * rows * out.stride - head * made;
      matmul_block(h.product, *shared_, scratch, 0, row, std::min(row + block, (head + 1) * rows), head * panels + panel,
                   head * panels + stop, to, out.stride);
      begin += stop - panel;
    }
  });
}

void Program::multiply_heads_backward(Worker& worker, const HeadsInstruction& h, std::int64_t rows) {
  const Buffer &x = buffers_[static_cast<std::size_t>(h.x)], &out = buffers_[static_cast<std::size_t>(h.out)];
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const Matrix& w = h.product.weights[0]->matrix();
  const std::int64_t summed = w.rows / h.heads, panels = summed / kPanelRows, first = h.first;
  const std::int64_t has = first + summed, made = first + w.columns, pieces = (w.tiles + kPieceTiles - 1) / kPieceTiles;
  worker.for_each(h.heads * pieces, 1, [&](std::int64_t i, std::int64_t) {
    const std::int64_t head = i / pieces, tile = i % pieces * kPieceTiles;
    const float* from = x.data() + head * has;
    float* to = out.data() + head * made;
    for (std::int64_t r = 0; tile == 0 && r < rows; ++r) {
      std::copy(from + r * x.stride, from + r * x.stride + first, to + r * out.stride);
    }
    context_->kernels->matmul_backward({&w, from + first, x.stride, rows, head * panels, (head + 1) * panels, tile,
                                        std::min(tile + kPieceTiles, w.tiles), to + first, out.stride,
                                        scratch.kernel.data()});
  });
  if (!w.mixed && !w.outliers) return;
  // Where columns were rotated (signs, then Hadamard matrices, which are symmetric), back: the matrices, then signs. And
  // what is kept apart from the codes.
  const std::vector<float> ones(static_cast<std::size_t>((w.columns + 15) / 16 * 16), 1.0f);
  Matrix unsigned_rotation = w;
  unsigned_rotation.rotation = ones.data();
  worker.for_each(rows * h.heads, 4, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> mixed(static_cast<std::size_t>(padded(w.columns)));
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = out.data() + i / h.heads * out.stride + i % h.heads * made + first;
      if (w.mixed) {
        context_->kernels->rotate_row(unsigned_rotation, row, mixed.data());
        for (std::int64_t k = 0; k < w.columns; ++k) row[k] = mixed[static_cast<std::size_t>(k)] * w.rotation[k];
      }
      const float* from = x.data() + i / h.heads * x.stride + i % h.heads * has + first;
      const std::int64_t top = i % h.heads * summed;  // the head's first row of the matrix
      const std::int32_t *begin_row = w.outlier_rows, *end_row = begin_row + w.outliers;
      for (auto* at = std::lower_bound(begin_row, end_row, top); at < end_row && *at < top + summed; ++at)
        row[w.outlier_columns[at - begin_row]] += w.outlier_values[at - begin_row] * from[*at - top];
    }
  });
}

}  // namespace kbit
