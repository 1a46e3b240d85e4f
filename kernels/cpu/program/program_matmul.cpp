// How a program multiplies: rows of x made ready once, then pieces of the matrices, shared out to the team.
#include <algorithm>
#include <cstring>

#include "program/program_scratch.h"

namespace kbit {
namespace {

// Rows that one piece of a large matmul covers: their int8 values stay in the second-level cache (256 x 2048 = 512 KB)
// while panel after panel meets them.
constexpr std::int64_t kRowBlock = 256;

// Up to here kernels go over the codes without a buffer (kDirectMost of the widest instruction set).
constexpr std::int64_t kFewRows = 64;

// int8 compute: where one segment of a row is this many times as large as its segments are on average, the row is
// multiplied a second time, with what rounding left of it. Attention sinks (the first token, those of a chat template)
// have such rows: one feature a hundred times the others, which the weights cancel again, so that what counts is beyond
// the eighth bit; with their values wrong, every token that attends to them is. Few rows are so, and text reads as with
// exact arithmetic then (docs/measurements.md).
constexpr float kSpike = 5.0f;

// Rows with spikes that are multiplied together the second time: one after the other they would have the weights decoded
// for each.
constexpr std::int64_t kSpikesTogether = kRowsWithoutScratch;

}  // namespace

void Program::prepare_rows(const MatmulInstruction& m, Inputs& inputs, const float* x, std::int64_t x_stride,
                           const std::int64_t* row_index, std::int64_t begin, std::int64_t end) const {
  const Kernels& kernels = *context_->kernels;
  const std::int64_t columns = m.weights[0]->matrix().columns, width = padded(columns);
  bool used[kForms] = {};
  mark_forms(m, used);
  const bool int8 = compute_ == Compute::int8, bf16 = compute_ == Compute::bf16;
  const auto rotated_weight = std::find_if(m.weights.begin(), m.weights.end(), [](const Weights& w) { return w->matrix().mixed; });
  for (std::int64_t row = begin; row < end; ++row) {
    const float* source = x + (row_index ? row_index[row] : row) * x_stride;
    float* floats = reinterpret_cast<float*>(inputs.floats.data()) + row * width;
    if (!m.norm.empty()) {
      m.norm.apply(kernels, source, floats);
      source = floats;
    } else if (row_index) {
      std::memcpy(floats, source, static_cast<std::size_t>(width) * 4);
    }
    for (int slot = 0; slot < kRotated; ++slot)
      if (int8 && used[slot]) round_row(inputs, slot, source, columns, row);
    const auto bfloats = [&](const float* from, const AlignedBytes& to) {
      kernels.bfloat_row(from, width, reinterpret_cast<std::uint16_t*>(to.data()) + row * width);
    };
    if (bf16) bfloats(source, inputs.bfloats);
    if (!used[kRotated]) continue;
    float* rotated = reinterpret_cast<float*>(inputs.rotated.data()) + row * width;
    kernels.rotate_row((*rotated_weight)->matrix(), source, rotated);
    if (int8) round_row(inputs, kRotated, rotated, (columns + 15) / 16 * 16, row);
    if (bf16) bfloats(rotated, inputs.rotated_bfloats);
  }
  if (begin != 0) return;  // what follows is of all rows, and whoever has the first of them says it
  const bool in_place = m.norm.empty() && row_index == nullptr;
  const auto view = [&](const Inputs::Rounded& rounded, int slot) {
    MatmulInput v;
    const bool rotated = slot == kRotated;
    v.x = rotated ? reinterpret_cast<const float*>(inputs.rotated.data())
          : in_place ? x : reinterpret_cast<const float*>(inputs.floats.data());
    v.x_stride = in_place && !rotated ? x_stride : width;
    const AlignedBytes& bfloats = rotated ? inputs.rotated_bfloats : inputs.bfloats;
    v.codes = reinterpret_cast<const std::int8_t*>(bf16 ? bfloats.data() : rounded.codes.data());
    v.codes_stride = bf16 ? 2 * width : width;
    v.scales = reinterpret_cast<const float*>(rounded.scales.data());
    v.sums = reinterpret_cast<const std::int32_t*>(rounded.sums.data());
    v.segments_stride = width / segment_of(slot);
    return v;
  };
  for (int slot = 0; slot < kForms; ++slot) {
    inputs.view[slot] = view(inputs.main[slot], slot);
    inputs.fine_view[slot] = view(inputs.fine[slot], slot);
  }
}

// One row to int8; and what that leaves of it too, where it has a spike.
void Program::round_row(Inputs& inputs, int slot, const float* source, std::int64_t columns, std::int64_t row) const {
  const Kernels& kernels = *context_->kernels;
  const int segment = segment_of(slot);
  const std::int64_t width = padded(columns), segments = width / segment;
  const auto round = [&](Inputs::Rounded& to, const float* from) {
    kernels.quantize_row(from, columns, segment, reinterpret_cast<std::int8_t*>(to.codes.data()) + row * width,
                         reinterpret_cast<float*>(to.scales.data()) + row * segments,
                         reinterpret_cast<std::int32_t*>(to.sums.data()) + row * segments);
  };
  round(inputs.main[slot], source);
  const float* scales = reinterpret_cast<const float*>(inputs.main[slot].scales.data()) + row * segments;
  float largest = 0.0f, sum = 0.0f;
  for (std::int64_t i = 0; i < segments; ++i) {
    largest = std::max(largest, scales[i]);
    sum += scales[i];
  }
  const bool spiky = largest * static_cast<float>((columns + segment - 1) / segment) > kSpike * sum;
  inputs.spiky[slot][static_cast<std::size_t>(row)] = spiky;
  if (!spiky) return;
  float* rest = reinterpret_cast<float*>(inputs.rest.data()) + row * width;
  const std::int8_t* codes = reinterpret_cast<const std::int8_t*>(inputs.main[slot].codes.data()) + row * width;
  for (std::int64_t k = 0; k < columns; ++k) rest[k] = source[k] - static_cast<float>(codes[k]) * scales[k / segment];
  std::fill(rest + columns, rest + width, 0.0f);
  round(inputs.fine[slot], rest);
}

void Program::run_kernel(const Inputs& inputs, MatmulTask& task, float* staging) const {
  const Kernels& kernels = *context_->kernels;
  const Matrix& w = *task.w;
  const int slot = form_of(w);
  task.x = inputs.view[slot];
  if (compute_ == Compute::bf16) return kernels.matmul_bf16(task);
  if (compute_ != Compute::int8 || w.bits == 0) return kernels.matmul_fp32(task);
  (w.code == Code::planes ? kernels.matmul_int8 : kernels.matmul_trellis)(task);
  std::int64_t spiky[kSpikesTogether], count = 0;
  for (std::int64_t row = task.row_begin; row < task.row_end; ++row) {
    if (!inputs.spiky[slot][static_cast<std::size_t>(row)]) continue;
    spiky[count++] = row;
    if (count == kSpikesTogether) {
      add_spikes(inputs.fine_view[slot], task, spiky, count, staging);
      count = 0;
    }
  }
  if (count > 0) add_spikes(inputs.fine_view[slot], task, spiky, count, staging);
}

// Adds the products of what rounding left of some rows: brought together, as the kernels take rows that follow each other.
void Program::add_spikes(const MatmulInput& fine, const MatmulTask& task, const std::int64_t* rows, std::int64_t count,
                         float* staging) const {
  const std::int64_t codes = fine.codes_stride, segments = fine.segments_stride;
  const std::int64_t width = (task.panel_end - task.panel_begin) * kPanelRows;
  if (kSpikesTogether * (codes + 8 * segments) > kMatmulScratch && count > 1) {  // rows too wide to be copied
    for (std::int64_t i = 0; i < count; ++i) add_spikes(fine, task, rows + i, 1, staging);
    return;
  }
  MatmulTask part = task;
  part.x = fine;
  part.row_begin = rows[0];
  part.row_end = rows[0] + count;
  part.out = staging;
  part.out_stride = width;
  if (count > 1) {
    // The kernels leave the scratch memory alone for so few rows, so there is room for them in it.
    auto* to_codes = reinterpret_cast<std::int8_t*>(task.scratch);
    auto* to_scales = reinterpret_cast<float*>(task.scratch + kSpikesTogether * codes);
    auto* to_sums = reinterpret_cast<std::int32_t*>(to_scales + kSpikesTogether * segments);
    for (std::int64_t i = 0; i < count; ++i) {
      std::memcpy(to_codes + i * codes, fine.codes + rows[i] * codes, static_cast<std::size_t>(codes));
      std::memcpy(to_scales + i * segments, fine.scales + rows[i] * segments, static_cast<std::size_t>(segments) * 4);
      std::memcpy(to_sums + i * segments, fine.sums + rows[i] * segments, static_cast<std::size_t>(segments) * 4);
    }
    part.x.codes = to_codes;
    part.x.scales = to_scales;
    part.x.sums = to_sums;
    part.row_begin = 0;
    part.row_end = count;
  }
  (task.w->code == Code::planes ? context_->kernels->matmul_int8 : context_->kernels->matmul_trellis)(part);
  for (std::int64_t i = 0; i < count; ++i)
    context_->kernels->add(staging + i * width, task.out + (rows[i] - task.row_begin) * task.out_stride, width);
}

namespace {

// Adds the products of weights that are kept apart from a matrix's codes, with x as it is.
void add_outliers(const MatmulInput& x, const MatmulTask& task) {
  const Matrix& w = *task.w;
  const std::int32_t *first = w.outlier_rows, *last = first + w.outliers;
  for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    const std::int64_t row = (w.panel_of ? w.panel_of[panel] : panel) * kPanelRows;  // of the whole matrix
    const std::int32_t* at = std::lower_bound(first, last, row);
    for (; at < last && *at < row + kPanelRows; ++at) {
      const std::int64_t i = at - first, k = w.outlier_columns[i];
      const float value = w.outlier_values[i];
      float* out = task.out + (panel - task.panel_begin) * kPanelRows + (*at - row);
      for (std::int64_t r = task.row_begin; r < task.row_end; ++r)
        out[(r - task.row_begin) * task.out_stride] += value * x.x[r * x.x_stride + k];
    }
  }
}

}  // namespace

// Rows [row_begin, row_end) of panels [panel_begin, panel_end) of one matrix (or of gate and up together).
void Program::matmul_block(const MatmulInstruction& m, const Inputs& inputs, Scratch& scratch, std::size_t which,
                           std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin, std::int64_t panel_end,
                           float* out, std::int64_t out_stride) const {
  const Kernels& kernels = *context_->kernels;
  const bool gated = m.activation != Activation::none && m.weights.size() == 2;
  const Matrix& w = m.weights[which]->matrix();
  const std::int64_t width = (panel_end - panel_begin) * kPanelRows;
  const std::int64_t valid = std::min(width, w.rows - panel_begin * kPanelRows);
  float* target = out + row_begin * out_stride + panel_begin * kPanelRows;
  // Straight to its place, unless something is done to it there or its last panel would write beyond the row.
  const bool staged = gated || m.residual || (valid < width && out_stride < w.panels * kPanelRows);
  auto multiply = [&](const Matrix& matrix, float* to, std::int64_t stride) {
    MatmulTask task{&matrix, {}, row_begin, row_end, panel_begin, panel_end, to, stride, scratch.kernel.data()};
    run_kernel(inputs, task, reinterpret_cast<float*>(scratch.third.data()));
    if (matrix.outliers) add_outliers(inputs.view[0], task);
  };
  auto add_bias = [&](std::size_t index, float* to, std::int64_t stride) {
    const std::vector<float>& bias = m.biases[index];
    if (bias.empty()) return;
    for (std::int64_t r = 0; r < row_end - row_begin; ++r)
      kernels.add(bias.data() + panel_begin * kPanelRows, to + r * stride, valid);
  };
  float* first = staged ? reinterpret_cast<float*>(scratch.first.data()) : target;
  const std::int64_t stride = staged ? width : out_stride;
  multiply(w, first, stride);
  add_bias(which, first, stride);
  float* second = nullptr;
  if (gated) {
    second = reinterpret_cast<float*>(scratch.second.data());
    if (m.weights[0] == m.weights[1] && m.biases[0] == m.biases[1]) {  // an expert without a gate: one product is both
      std::memcpy(second, first, static_cast<std::size_t>((row_end - row_begin) * width) * 4);
    } else {
      multiply(m.weights[1]->matrix(), second, width);
      add_bias(1, second, width);
    }
    if (m.limit > 0.0f) {  // g sigmoid(alpha g) = silu(alpha g) / alpha
      for (std::int64_t i = 0; i < (row_end - row_begin) * width; ++i) {
        first[i] = m.alpha * std::min(first[i], m.limit);
        second[i] = (std::clamp(second[i], -m.limit, m.limit) + 1.0f) / m.alpha;
      }
    }
  }
  for (std::int64_t r = 0; r < row_end - row_begin; ++r) {
    float* to = target + r * out_stride;
    const float* from = first + r * stride;
    if (m.activation != Activation::none) {
      kernels.activate(from, second ? second + r * width : nullptr, to, valid, m.activation);
    } else if (m.residual) {
      kernels.add(from, to, valid);
    } else if (staged) {
      std::memcpy(to, from, static_cast<std::size_t>(valid) * 4);
    }
  }
}

// With `out` null the results go to the instruction's buffers.
void Program::matmul(Worker& worker, const MatmulInstruction& m, const float* x, std::int64_t x_stride,
                     const std::int64_t* row_index, std::int64_t rows, float* out, std::int64_t out_stride) {
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const std::int64_t columns = padded(m.weights[0]->matrix().columns);
  const bool gated = m.activation != Activation::none && m.weights.size() == 2;
  const std::size_t matrices = gated ? 1 : m.weights.size();
  std::int64_t panels = 0, panel_bytes = 1;
  for (std::size_t i = 0; i < matrices; ++i) {
    const Matrix& w = m.weights[i]->matrix();
    panels += w.panels;
    panel_bytes = std::max(panel_bytes, w.bits ? w.panel_bytes() : w.tiles * kTileWeights * bytes_of(w.value_kind));
  }
  const std::int64_t block = std::min(rows, kRowBlock), blocks = (rows + block - 1) / block;
  // Few rows: reading weights is all there is to it, and a memory stream takes a while to reach its speed, so pieces are
  // long (256 KB) and a small matrix is one piece for each member (docs/measurements.md).
  // Many rows: a pair of panels at a time, which is work enough.
  std::int64_t grain = 2;
  if (rows <= kFewRows) {
    const std::int64_t share = (panels + worker.size() - 1) / worker.size();
    grain = std::clamp<std::int64_t>((256 << 10) / panel_bytes, 1, share);
  }
  grain = std::clamp<std::int64_t>(kStaging / (block * kPanelRows), 1, grain);
  const std::int64_t groups = (panels + grain - 1) / grain;
  const std::int64_t count = blocks == 1 ? panels : blocks * groups;

  Inputs* inputs = shared_.get();
  if (rows <= scratch.inputs->rows && (worker.size() == 1 || rows * columns <= kRedundantInput)) {
    // A member that is behind may read x while others write what comes next; it then finds no piece to use it for.
    inputs = scratch.inputs.get();
    if (!worker.nothing_left(count)) prepare_rows(m, *inputs, x, x_stride, row_index, 0, rows);
  } else {
    worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
      prepare_rows(m, *inputs, x, x_stride, row_index, begin, end);
    });
  }
  // Panels are numbered through all matrices; a piece that touches two is cut.
  auto piece = [&](std::int64_t row_begin, std::int64_t row_end, std::int64_t begin, std::int64_t end) {
    std::int64_t first = 0;
    for (std::size_t i = 0; i < matrices; ++i) {
      const std::int64_t count = m.weights[i]->matrix().panels;
      const std::int64_t from = std::max(begin, first), to = std::min(end, first + count);
      if (from < to) {
        const Buffer* buffer = out ? nullptr : &buffers_[static_cast<std::size_t>(m.outs[i])];
        matmul_block(m, *inputs, scratch, i, row_begin, row_end, from - first, to - first, buffer ? buffer->data() : out,
                     buffer ? buffer->stride : out_stride);
      }
      first += count;
    }
  };
  if (blocks == 1) {
    worker.for_each(count, grain, [&](std::int64_t begin, std::int64_t end) { piece(0, rows, begin, end); });
  } else {
    worker.for_each(count, 1, [&](std::int64_t index, std::int64_t) {
      const std::int64_t row = index / groups * block, panel = index % groups * grain;
      piece(row, std::min(row + block, rows), panel, std::min(panel + grain, panels));
    });
  }
}

}  // namespace kbit
