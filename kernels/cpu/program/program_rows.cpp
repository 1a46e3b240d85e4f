// What a program does to rows one by one: norms, products, factors, caps, rotations and the widths of heads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "program/program.h"
#include "program/program_scratch.h"

namespace kbit {

namespace {

// Sums in 16 lanes, which compilers turn into vectors, and the same bits on every instruction set.
struct Lanes {
  float at[16] = {};
  float total() const {
    float sum = 0.0f;
    for (const float lane : at) sum += lane;
    return sum;
  }
};

}  // namespace

void Norm::apply(const Kernels& kernels, const float* x, float* out) const {
  const std::int64_t columns = width();
  if (!centred) return kernels.rms_norm(x, weight.data(), columns, eps, out);
  Lanes sum, squares;
  for (std::int64_t k = 0; k < columns; ++k) sum.at[k % 16] += x[k];
  const float mean = sum.total() / static_cast<float>(columns);
  for (std::int64_t k = 0; k < columns; ++k) squares.at[k % 16] += (x[k] - mean) * (x[k] - mean);
  const float factor = 1.0f / std::sqrt(squares.total() / static_cast<float>(columns) + eps);
  for (std::int64_t k = 0; k < columns; ++k) {
    const float scaled = weight[static_cast<std::size_t>(k)] * ((x[k] - mean) * factor);
    out[k] = bias.empty() ? scaled : scaled + bias[static_cast<std::size_t>(k)];
  }
  std::fill(out + columns, out + padded(columns), 0.0f);
}

void Program::norm(Worker& worker, const NormInstruction& n, std::int64_t rows) {
  const Kernels& kernels = *context_->kernels;
  const Buffer &x = buffers_[static_cast<std::size_t>(n.x)], &out = buffers_[static_cast<std::size_t>(n.out)];
  const std::int64_t width = n.norms[0].width(), runs = x.width / width;
  const auto count = static_cast<std::int64_t>(n.norms.size());
  if (runs == 1) {
    return worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        n.norms[0].apply(kernels, x.data() + r * x.stride, out.data() + r * out.stride);
    });
  }
  // By way of scratch: what a norm writes is padded, and would reach into the next run, or the next row.
  float* scratch = reinterpret_cast<float*>(scratch_[static_cast<std::size_t>(worker.index())]->kernel.data());
  worker.for_each(rows * runs, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / runs, first = i % runs * width;
      const Norm& norm = n.norms[static_cast<std::size_t>(count == 1 ? 0 : i % runs)];
      norm.apply(kernels, x.data() + row * x.stride + first, scratch);
      std::memcpy(out.data() + row * out.stride + first, scratch, static_cast<std::size_t>(width) * 4);
    }
  });
}

void Program::map(Worker& worker, const MapInstruction& m, std::int64_t rows) {
  const Kernels& kernels = *context_->kernels;
  const Buffer &x = buffers_[static_cast<std::size_t>(m.x)], &out = buffers_[static_cast<std::size_t>(m.out)];
  worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* from = x.data() + r * x.stride;
      float* to = out.data() + r * out.stride;
      for (std::int64_t k = 0; k < x.width; ++k) to[k] = from[k] * m.factor;
      if (m.cap > 0.0f) kernels.soft_cap(to, x.width, m.cap);
    }
  });
}

void Program::multiply(Worker& worker, const MultiplyInstruction& m, std::int64_t rows) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  const Buffer &x = at(m.x), &y = at(m.y), &out = at(m.out);
  worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float *one = x.data() + r * x.stride, *other = y.data() + r * y.stride;
      float* to = out.data() + r * out.stride;
      for (std::int64_t k = 0; k < x.width; ++k) to[k] = one[k] * other[k];
    }
  });
}

void Program::rotate(Worker& worker, const RotateInstruction& n, const Pass& pass) {
  const Buffer &x = buffers_[static_cast<std::size_t>(n.x)], &out = buffers_[static_cast<std::size_t>(n.out)];
  const std::int64_t heads = x.width / n.head_dim;
  worker.for_each(pass.rows * heads, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / heads, first = i % heads * n.head_dim;
      const std::int64_t angle = std::int64_t{pass.rope_row[row]} * pass.table_half + n.first;
      const float *from = x.data() + row * x.stride + first, *cos = pass.cos + angle, *sin = pass.sin + angle;
      float* to = out.data() + row * out.stride + first;
      for (int k = 0; k < n.half; ++k) {  // with the roundings of reference.rope
        to[k] = from[k] * cos[k] - from[n.half + k] * sin[k];
        to[n.half + k] = from[n.half + k] * cos[k] + from[k] * sin[k];
      }
      std::copy(from + 2 * n.half, from + n.head_dim, to + 2 * n.half);
    }
  });
}

void Program::fit_heads(Worker& worker, const FitInstruction& f, std::int64_t rows) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  const Buffer &x = at(f.x), &out = at(f.out);
  const Buffer* const shared = f.shared < 0 ? nullptr : &at(f.shared);
  const std::int64_t before = shared ? shared->width : 0, has = x.width / f.heads, wanted = out.width / f.heads;
  const std::int64_t own = std::min(has, wanted - before);
  worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float *from = x.data() + r * x.stride, *first = shared ? shared->data() + r * shared->stride : nullptr;
      float* to = out.data() + r * out.stride;
      for (int h = 0; h < f.heads; ++h, from += has, to += wanted) {
        std::copy(first, first + before, to);
        std::copy(from, from + own, to + before);
        std::fill(to + before + own, to + wanted, 0.0f);
      }
    }
  });
}

void Program::finish_logits(Worker& worker, std::int64_t rows, float* out) {
  if (logit_factor_ == 1.0f && logit_cap_ == 0.0f) return;
  constexpr std::int64_t kPiece = 4096;
  const std::int64_t count = rows * vocabulary();
  worker.for_each((count + kPiece - 1) / kPiece, 1, [&](std::int64_t i, std::int64_t) {
    float* x = out + i * kPiece;
    const std::int64_t n = std::min(kPiece, count - i * kPiece);
    for (std::int64_t k = 0; k < n; ++k) x[k] *= logit_factor_;
    if (logit_cap_ > 0.0f) context_->kernels->soft_cap(x, n, logit_cap_);
  });
}

}  // namespace kbit
