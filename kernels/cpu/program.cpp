#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kv_cache.h"

namespace kbit {
namespace {

// Up to this many numbers are normalised and quantized by every member for itself: that takes less than waiting for the
// others after sharing the work (0.3 microseconds for 1024 numbers against 0.5 and more).
constexpr std::int64_t kRedundantInput = 4096;

// Rows that one piece of a large matmul covers: their int8 values stay in the second-level cache (256 x 2048 = 512 KB)
// while panel after panel meets them.
constexpr std::int64_t kRowBlock = 256;

// Results of a piece that do not go straight to their place: 64 KB of floats, twice for gate and up.
constexpr std::int64_t kStaging = 16 << 10;

// Kernels hold at most this many rows at once without a buffer (the most any instruction set has).
constexpr std::int64_t kFewRows = 8;

// int8 compute: where one segment of a row is this many times as large as its segments are on average, the row is
// multiplied a second time, with what rounding left of it. Attention sinks (the first token, those of a chat template)
// have such rows: one feature a hundred times the others, which the weights cancel again, so that what counts is beyond
// the eighth bit; with their values wrong, every token that attends to them is. On SmolLM2 that is 5 % of all rows. KL from
// exact arithmetic at 4 bits falls from 0.0073 to 0.0064 on running text, and "What is the capital of France?" in the chat
// template is answered with Paris, as by fp32, and no longer with a street.
constexpr float kSpike = 5.0f;

constexpr std::int64_t padded(std::int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns * kTileColumns; }

int segment_slot(int segment) { return segment == 64 ? 0 : segment == 32 ? 1 : 2; }

// Marks the segments in which an int8 matmul wants its input.
void mark_segments(const MatmulInstruction& m, bool used[3]) {
  for (const Weights& w : m.weights)
    if (w->matrix().bits) used[segment_slot(w->matrix().segment)] = true;
}

}  // namespace

struct Program::Inputs {
  // int8 values of rows, or of what rounding them left (see kSpike).
  struct Rounded {
    AlignedBytes codes, scales, sums;
    void reserve(std::size_t count, std::size_t segment) {
      codes = AlignedBytes(count);
      scales = AlignedBytes(count / segment * 4);
      sums = AlignedBytes(count / segment * 4);
    }
    std::size_t size() const { return codes.size() + scales.size() + sums.size(); }
  };
  std::int64_t rows = 0, width = 0;
  AlignedBytes floats, bfloats, rest;
  Rounded main[3], fine[3];
  std::vector<std::uint8_t> spiky[3];  // per row: `fine` counts
  MatmulInput view[3], fine_view[3];

  // Memory for this many rows of this width, in the forms that are used.
  void reserve(std::int64_t new_rows, std::int64_t new_width, const bool used[3], bool use_bfloats) {
    rows = new_rows;
    width = new_width;
    const std::size_t count = static_cast<std::size_t>(rows * width);
    floats = AlignedBytes(count * 4);
    for (int slot = 0; slot < 3; ++slot) {
      if (!used[slot]) continue;
      main[slot].reserve(count, static_cast<std::size_t>(64 >> slot));
      fine[slot].reserve(count, static_cast<std::size_t>(64 >> slot));
      spiky[slot].assign(static_cast<std::size_t>(rows), 0);
      rest = AlignedBytes(count * 4);
    }
    if (use_bfloats) bfloats = AlignedBytes(count * 2);
  }
};

struct Program::Scratch {
  AlignedBytes kernel{static_cast<std::size_t>(kMatmulScratch)};
  AlignedBytes first{kStaging * 4}, second{kStaging * 4}, third{kStaging * 4};
  std::unique_ptr<Inputs> inputs = std::make_unique<Inputs>();
};

Program::Program(std::shared_ptr<Context> context, Compute compute) : context_(std::move(context)), compute_(compute) {
  if (compute_ == Compute::bf16 && context_->kernels->matmul_bf16 == nullptr) {
    throw std::invalid_argument(std::string("compute bf16 needs an instruction set with bfloat16 products, which ") +
                                context_->kernels->name + " has not: use int8 or fp32");
  }
  shared_ = std::make_unique<Inputs>();
  for (int i = 0; i < context_->team->size(); ++i) scratch_.push_back(std::make_unique<Scratch>());
}

Program::~Program() = default;

int Program::buffer(std::int64_t width) {
  if (width < 1) throw std::invalid_argument("a buffer needs a width of at least 1");
  buffers_.push_back({width, padded(width), {}});
  capacity_ = 0;
  return static_cast<int>(buffers_.size()) - 1;
}

void Program::check(const MatmulInstruction& m) const {
  const std::size_t count = m.weights.size();
  const bool gated = m.activation != Activation::none && count == 2;
  if (count == 0 || m.biases.size() != count || m.outs.size() != (gated ? 1 : count)) {
    throw std::invalid_argument("a matmul needs a bias (or none) for every matrix, and an output for every result");
  }
  if (m.activation != Activation::none && count > 2) throw std::invalid_argument("an activation takes one or two matrices");
  if (m.residual && (count != 1 || gated)) throw std::invalid_argument("a residual sum has one matrix and one output");
  for (std::size_t i = 0; i < count; ++i) {
    const Matrix& w = m.weights[i]->matrix();
    if (w.columns != buffer_width(m.x)) throw std::invalid_argument("a matrix does not fit its input buffer");
    if (w.rows != buffer_width(m.outs[gated ? 0 : i])) throw std::invalid_argument("a matrix does not fit its output buffer");
    if (!m.biases[i].empty() && static_cast<std::int64_t>(m.biases[i].size()) != w.rows) {
      throw std::invalid_argument("a bias does not fit its matrix");
    }
  }
  if (!m.norm.empty() && static_cast<std::int64_t>(m.norm.size()) != buffer_width(m.x)) {
    throw std::invalid_argument("a norm does not fit its input buffer");
  }
}

void Program::append(Instruction instruction) {
  if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) {
    check(*m);
    widest_input_ = std::max(widest_input_, padded(buffer_width(m->x)));
  } else if (const auto* a = std::get_if<AttendInstruction>(&instruction)) {
    const AttendInstruction* first = first_attention();
    if (first && (first->heads != a->heads || first->kv_heads != a->kv_heads || first->head_dim != a->head_dim)) {
      throw std::invalid_argument("all attentions of a program have the same heads");
    }
  }
  instructions_.push_back(std::move(instruction));
  capacity_ = 0;
}

void Program::set_head(MatmulInstruction head) {
  if (hidden_ < 0) throw std::invalid_argument("finish() comes before head()");
  const Matrix& w = head.weights.at(0)->matrix();
  if (w.columns != hidden_width() || (!head.norm.empty() && static_cast<std::int64_t>(head.norm.size()) != w.columns)) {
    throw std::invalid_argument("the head does not fit the hidden states");
  }
  widest_input_ = std::max(widest_input_, padded(w.columns));
  head_ = std::move(head);
  capacity_ = 0;
}

std::size_t Program::nbytes() const {
  std::size_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.memory.size();
  auto inputs = [](const Inputs& in) {
    std::size_t bytes = in.floats.size() + in.bfloats.size() + in.rest.size();
    for (int slot = 0; slot < 3; ++slot) bytes += in.main[slot].size() + in.fine[slot].size();
    return bytes;
  };
  total += inputs(*shared_);
  for (const auto& scratch : scratch_) {
    total += scratch->kernel.size() + 3 * scratch->first.size() + inputs(*scratch->inputs);
  }
  return total;
}

void Program::reserve(std::int64_t rows) {
  if (rows <= capacity_) return;
  const bool bfloats = compute_ == Compute::bf16;
  bool used[3] = {false, false, false};
  if (compute_ == Compute::int8) {
    for (const Instruction& instruction : instructions_)
      if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) mark_segments(*m, used);
    if (head_) mark_segments(*head_, used);
  }
  for (Buffer& buffer : buffers_) buffer.memory = AlignedBytes(static_cast<std::size_t>(rows * buffer.stride) * 4);
  shared_->reserve(rows, widest_input_, used, bfloats);
  const std::int64_t few = std::max<std::int64_t>(1, std::min(rows, kRedundantInput / widest_input_));
  for (auto& scratch : scratch_) scratch->inputs->reserve(few, widest_input_, used, bfloats);
  capacity_ = rows;
}

void Program::prepare_rows(const MatmulInstruction& m, Inputs& inputs, const float* x, std::int64_t x_stride,
                           const std::int64_t* row_index, std::int64_t begin, std::int64_t end) const {
  const Kernels& kernels = *context_->kernels;
  const std::int64_t columns = m.weights[0]->matrix().columns, width = padded(columns);
  bool used[3] = {false, false, false};
  if (compute_ == Compute::int8) mark_segments(m, used);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* source = x + (row_index ? row_index[row] : row) * x_stride;
    float* floats = reinterpret_cast<float*>(inputs.floats.data()) + row * width;
    if (!m.norm.empty()) {
      kernels.rms_norm(source, m.norm.data(), columns, m.eps, floats);
      source = floats;
    } else if (row_index) {
      std::memcpy(floats, source, static_cast<std::size_t>(width) * 4);
    }
    for (int slot = 0; slot < 3; ++slot)
      if (used[slot]) round_row(inputs, slot, source, columns, row);
    if (compute_ == Compute::bf16) {
      kernels.bfloat_row(source, width, reinterpret_cast<std::uint16_t*>(inputs.bfloats.data()) + row * width);
    }
  }
  const bool in_place = m.norm.empty() && row_index == nullptr;
  const auto view = [&](const Inputs::Rounded& rounded, int slot) {
    MatmulInput v;
    v.x = in_place ? x : reinterpret_cast<const float*>(inputs.floats.data());
    v.x_stride = in_place ? x_stride : width;
    const bool bf16 = compute_ == Compute::bf16;
    v.codes = reinterpret_cast<const std::int8_t*>(bf16 ? inputs.bfloats.data() : rounded.codes.data());
    v.codes_stride = bf16 ? 2 * width : width;
    v.scales = reinterpret_cast<const float*>(rounded.scales.data());
    v.sums = reinterpret_cast<const std::int32_t*>(rounded.sums.data());
    v.segments_stride = width / (64 >> slot);
    return v;
  };
  for (int slot = 0; slot < 3; ++slot) {
    inputs.view[slot] = view(inputs.main[slot], slot);
    inputs.fine_view[slot] = view(inputs.fine[slot], slot);
  }
}

// One row to int8; and what that leaves of it too, where it has a spike.
void Program::round_row(Inputs& inputs, int slot, const float* source, std::int64_t columns, std::int64_t row) const {
  const Kernels& kernels = *context_->kernels;
  const int segment = 64 >> slot;
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
  round(inputs.fine[slot], rest);
}

void Program::run_kernel(const Inputs& inputs, MatmulTask& task, float* staging) const {
  const Kernels& kernels = *context_->kernels;
  const Matrix& w = *task.w;
  const int slot = segment_slot(w.bits ? w.segment : 64);
  task.x = inputs.view[slot];
  if (compute_ == Compute::bf16) return kernels.matmul_bf16(task);
  if (compute_ != Compute::int8 || w.bits == 0) return kernels.matmul_fp32(task);
  kernels.matmul_int8(task);
  const std::int64_t width = (task.panel_end - task.panel_begin) * kPanelRows;
  for (std::int64_t row = task.row_begin; row < task.row_end; ++row) {
    if (!inputs.spiky[slot][static_cast<std::size_t>(row)]) continue;
    MatmulTask fine = task;
    fine.x = inputs.fine_view[slot];
    fine.row_begin = row;
    fine.row_end = row + 1;
    fine.out = staging;
    fine.out_stride = width;
    kernels.matmul_int8(fine);
    kernels.add(staging, task.out + (row - task.row_begin) * task.out_stride, width);
  }
}

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
    multiply(m.weights[1]->matrix(), second, width);
    add_bias(1, second, width);
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
  // Pieces are small enough to share evenly and to hold nobody up for long (64 KB of weights, a few microseconds), and
  // fit the staging memory. Many rows: a pair of panels at a time.
  std::int64_t grain = 2;
  if (rows <= kFewRows) grain = std::clamp<std::int64_t>((64 << 10) / panel_bytes, 1, 1 + panels / (8 * worker.size()));
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

const AttendInstruction* Program::first_attention() const {
  for (const Instruction& instruction : instructions_)
    if (const auto* a = std::get_if<AttendInstruction>(&instruction)) return a;
  return nullptr;
}

void Program::attend(Worker& worker, const AttendInstruction& a, const Pass& pass) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  AttentionArgs args{};
  args.q = at(a.q).data();
  args.k = at(a.k).data();
  args.v = at(a.v).data();
  args.out = at(a.out).data();
  args.q_stride = at(a.q).stride;
  args.k_stride = at(a.k).stride;
  args.v_stride = at(a.v).stride;
  args.out_stride = at(a.out).stride;
  args.rows = pass.rows;
  args.sequence = pass.sequence;
  args.position = pass.position;
  args.cos = pass.cos;
  args.sin = pass.sin;
  args.rope_row = pass.rope_row;
  args.rotated_half = pass.rotated_half;
  args.heads = a.heads;
  args.kv_heads = a.kv_heads;
  args.head_dim = a.head_dim;
  args.scale = a.scale;
  args.window = a.window;
  args.cache = pass.cache;
  args.layer = a.layer;
  attention(context_->kernels->attention, worker, args, attention_scratch_);
}

void Program::run(const Pass& pass) {
  if (hidden_ < 0) throw std::invalid_argument("the program is not finished");
  const std::int64_t limit = [&] {
    for (const Instruction& i : instructions_)
      if (const auto* e = std::get_if<EmbedInstruction>(&i)) return e->weights->matrix().rows;
    return std::int64_t{0};
  }();
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    if (pass.ids[r] < 0 || pass.ids[r] >= limit) throw std::invalid_argument("a token id is outside the vocabulary");
  }
  for (std::int64_t i = 0; i < pass.logits_rows; ++i) {
    if (pass.logits_row[i] < 0 || pass.logits_row[i] >= pass.rows) throw std::invalid_argument("no such row for logits");
  }
  reserve(std::max(pass.rows, pass.logits_rows));
  const Kernels& kernels = *context_->kernels;
  auto at = [&](int index) -> Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  if (const AttendInstruction* a = first_attention()) {
    const CacheView& view = pass.cache->view();
    if (view.kv_heads != a->kv_heads || view.head_dim != a->head_dim || 2 * pass.rotated_half > a->head_dim) {
      throw std::invalid_argument("the cache or the rotary tables do not fit the program's heads");
    }
    for (const Instruction& instruction : instructions_) {
      const auto* other = std::get_if<AttendInstruction>(&instruction);
      if (other && other->layer >= pass.cache->layers()) throw std::invalid_argument("the cache has too few layers");
    }
    attention_scratch_.prepare(pass.rows, pass.sequence, pass.position, a->heads, a->kv_heads, a->head_dim,
                               context_->team->size());
  }
  context_->team->run([&](Worker& worker) {
    for (const Instruction& instruction : instructions_) {
      if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) {
        matmul(worker, *m, at(m->x).data(), at(m->x).stride, nullptr, pass.rows, nullptr, 0);
      } else if (const auto* a = std::get_if<AttendInstruction>(&instruction)) {
        attend(worker, *a, pass);
      } else if (const auto* e = std::get_if<EmbedInstruction>(&instruction)) {
        worker.for_each(pass.rows, 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            kernels.decode_row(e->weights->matrix(), pass.ids[r], at(e->out).data() + r * at(e->out).stride);
        });
      } else if (const auto* n = std::get_if<NormInstruction>(&instruction)) {
        worker.for_each(pass.rows, 4, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            kernels.rms_norm(at(n->x).data() + r * at(n->x).stride, n->weight.data(), at(n->x).width, n->eps,
                             at(n->out).data() + r * at(n->out).stride);
        });
      } else if (const auto* g = std::get_if<ActivateInstruction>(&instruction)) {
        worker.for_each(pass.rows, 4, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            kernels.activate(at(g->gate).data() + r * at(g->gate).stride,
                             g->up < 0 ? nullptr : at(g->up).data() + r * at(g->up).stride,
                             at(g->out).data() + r * at(g->out).stride, at(g->gate).width, g->kind);
        });
      }
    }
    const Buffer& hidden = at(hidden_);
    if (pass.logits_rows >= 0) {
      if (pass.logits_rows > 0) {
        matmul(worker, *head_, hidden.data(), hidden.stride, pass.logits_row, pass.logits_rows, pass.out, vocabulary());
      }
    } else {
      worker.for_each(pass.rows, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r)
          std::memcpy(pass.out + r * hidden.width, hidden.data() + r * hidden.stride, static_cast<std::size_t>(hidden.width) * 4);
      });
    }
  });
}

void Program::logits(const float* hidden, std::int64_t rows, float* out) {
  if (!head_) throw std::invalid_argument("the program has no head");
  reserve(rows);
  Buffer& buffer = buffers_[static_cast<std::size_t>(hidden_)];
  for (std::int64_t r = 0; r < rows; ++r)
    std::memcpy(buffer.data() + r * buffer.stride, hidden + r * buffer.width, static_cast<std::size_t>(buffer.width) * 4);
  context_->team->run(
      [&](Worker& worker) { matmul(worker, *head_, buffer.data(), buffer.stride, nullptr, rows, out, vocabulary()); });
}

}  // namespace kbit
