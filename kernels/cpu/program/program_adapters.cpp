// What adapters add to products, row by row: kernels/reference.py, add_low_rank. Always in fp32, whatever the program
// computes in: factors are small, and training left them unrounded.
#include <algorithm>
#include <stdexcept>

#include "program/program_scratch.h"

namespace kbit {
namespace {

// Rows and panels of a piece of the second product, whose results fit the staging memory.
constexpr std::int64_t kPieceRows = 32, kPiecePanels = kStaging / (kPieceRows * kPanelRows);

// x W^T of some rows and panels.
void multiply_factor(const Kernels& kernels, const Matrix& w, const float* x, std::int64_t x_stride, std::int64_t rows,
                     std::int64_t panel_begin, std::int64_t panel_end, float* out, std::int64_t out_stride, std::uint8_t* scratch) {
  MatmulTask task{&w, {}, 0, rows, panel_begin, panel_end, out, out_stride, scratch};
  task.x.x = x;
  task.x.x_stride = x_stride;
  kernels.matmul_fp32(task);
}

}  // namespace

void Program::check(AdaptInstruction& a) {
  const std::size_t count = a.outs.size();
  if (count == 0 || a.factors.size() != count) throw std::invalid_argument("every output has the factors of all adapters");
  for (std::size_t i = 0; i < count; ++i) {
    if (a.factors[i].size() != a.factors[0].size() || a.factors[i].empty()) {
      throw std::invalid_argument("every output has the factors of all adapters");
    }
    if (a.outs[i] == a.x) throw std::invalid_argument("an adapter cannot write over its input");
    const std::int64_t width = buffer_width(a.outs[i]);
    a.first_piece.push_back(a.pieces);
    a.pieces += ((width + kPanelRows - 1) / kPanelRows + kPiecePanels - 1) / kPiecePanels;
    for (const Factors& f : a.factors[i]) {
      if (!f.down) continue;
      const Matrix &down = f.down->matrix(), &up = f.up->matrix();
      if (down.columns != buffer_width(a.x) || up.rows != width || down.rows != up.columns) {
        throw std::invalid_argument("the factors of an adapter do not fit their buffers");
      }
      if (down.bits || up.bits) throw std::invalid_argument("the factors of an adapter are not quantized");
      a.stride = std::max(a.stride, padded(down.rows));
    }
  }
  if (adapters_ && adapters_ != a.factors[0].size()) throw std::invalid_argument("all products have the same adapters");
  adapters_ = a.factors[0].size();
  low_rank_width_ = std::max(low_rank_width_, static_cast<std::int64_t>(count) * a.stride);
}

void Program::prepare_adapters(const Pass& pass) {
  adapted_.clear();
  for (std::int64_t r = 0; pass.adapter && r < pass.rows; ++r) {
    const std::int32_t adapter = pass.adapter[r];
    if (adapter >= 0 && static_cast<std::size_t>(adapter) >= adapters_) throw std::invalid_argument("there is no such adapter");
    if (adapter < 0) continue;
    const bool goes_on = !adapted_.empty() && adapted_.back().adapter == adapter && adapted_.back().end == r &&
                         r - adapted_.back().begin < kPieceRows;
    if (goes_on) {
      ++adapted_.back().end;
    } else {
      adapted_.push_back({adapter, r, r + 1});
    }
  }
}

void Program::adapt(Worker& worker, const AdaptInstruction& a) {
  if (adapted_.empty()) return;
  const Kernels& kernels = *context_->kernels;
  const Buffer& x = buffers_[static_cast<std::size_t>(a.x)];
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const auto outs = static_cast<std::int64_t>(a.outs.size()), spans = static_cast<std::int64_t>(adapted_.size());
  const std::int64_t stride = outs * a.stride;
  float* low = reinterpret_cast<float*>(low_rank_.data());
  const auto factors = [&](std::int64_t out, const AdaptedRows& span) -> const Factors& {
    return a.factors[static_cast<std::size_t>(out)][static_cast<std::size_t>(span.adapter)];
  };
  worker.for_each(spans * outs, 1, [&](std::int64_t i, std::int64_t) {
    const AdaptedRows& span = adapted_[static_cast<std::size_t>(i / outs)];
    const Factors& f = factors(i % outs, span);
    if (!f.down) return;
    const Matrix& down = f.down->matrix();
    float* to = low + span.begin * stride + i % outs * a.stride;
    multiply_factor(kernels, down, x.data() + span.begin * x.stride, x.stride, span.end - span.begin, 0, down.panels, to, stride,
             scratch.kernel.data());
    for (std::int64_t r = 0; r < span.end - span.begin; ++r, to += stride) {
      for (std::int64_t k = 0; k < down.rows; ++k) to[k] *= f.scale;
      std::fill(to + down.rows, to + padded(down.rows), 0.0f);
    }
  });
  worker.for_each(spans * a.pieces, 1, [&](std::int64_t i, std::int64_t) {
    const AdaptedRows& span = adapted_[static_cast<std::size_t>(i / a.pieces)];
    const auto after = std::upper_bound(a.first_piece.begin(), a.first_piece.end(), i % a.pieces);
    const std::int64_t of = after - a.first_piece.begin() - 1;
    const Factors& f = factors(of, span);
    if (!f.down) return;
    const Matrix& up = f.up->matrix();
    const std::int64_t panel = (i % a.pieces - a.first_piece[static_cast<std::size_t>(of)]) * kPiecePanels;
    const std::int64_t stop = std::min(up.panels, panel + kPiecePanels), width = (stop - panel) * kPanelRows;
    const std::int64_t valid = std::min(width, up.rows - panel * kPanelRows);
    float* made = reinterpret_cast<float*>(scratch.first.data());
    multiply_factor(kernels, up, low + span.begin * stride + of * a.stride, stride, span.end - span.begin, panel, stop, made, width,
             scratch.kernel.data());
    const Buffer& out = buffers_[static_cast<std::size_t>(a.outs[static_cast<std::size_t>(of)])];
    for (std::int64_t r = span.begin; r < span.end; ++r)
      kernels.add(made + (r - span.begin) * width, out.data() + r * out.stride + panel * kPanelRows, valid);
  });
}

}  // namespace kbit
