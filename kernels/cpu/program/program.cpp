#include "program/program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "attention/kv_pages.h"
#include "program/program_scratch.h"

namespace kbit {

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
  if (width < 1 || width > std::int64_t{1} << 31) throw std::invalid_argument("a buffer has a width of 1 to 2^31");
  buffers_.push_back({width, padded(width), {}});
  capacity_ = 0;
  return static_cast<int>(buffers_.size()) - 1;
}

namespace {

// Products of one x take it in one rotation.
void check_rotation(const MatmulInstruction& m) {
  const Matrix* first = nullptr;
  for (const Weights& weights : m.weights) {
    const Matrix& w = weights->matrix();
    if (!w.mixed) continue;
    if (!first) first = &w;
    if (!w.shares_input(*first)) {
      throw std::invalid_argument("matrices of one input are rotated in different ways: give them one trellis format (-h)");
    }
  }
}

}  // namespace

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
  if (!m.norm.empty() && m.norm.width() != buffer_width(m.x)) {
    throw std::invalid_argument("a norm does not fit its input buffer");
  }
  check_rotation(m);
}

void Program::append(Instruction instruction) {
  if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) {
    check(*m);
    for (const Weights& weights : m->weights) note_file(weights);
    widest_input_ = std::max(widest_input_, padded(buffer_width(m->x)));
  } else if (const auto* e = std::get_if<EmbedInstruction>(&instruction)) {
    const Matrix& table = e->weights->matrix();
    if (table.mixed) throw std::invalid_argument("rows of a rotated matrix are not looked up");
    if (table.outliers) throw std::invalid_argument("rows of a matrix that keeps weights apart are not looked up");
    note_file(e->weights);
  } else if (auto* a = std::get_if<AttendInstruction>(&instruction)) {
    a->plan = plan_of(*a);
  } else if (auto* x = std::get_if<ExpertsInstruction>(&instruction)) {
    check(*x);
    for (const auto* all : {&x->all_inner, &x->all_down}) check_rotation(*all);
    for (const auto* products : {&x->inner, &x->down}) {
      for (const MatmulInstruction& product : *products)
        for (const Weights& weights : product.weights) note_file(weights);
      widest_input_ = std::max(widest_input_, padded(products->at(0).weights[0]->matrix().columns));
    }
    x->index = mixtures_++;
  } else if (const auto* h = std::get_if<HeadsInstruction>(&instruction)) {
    check(*h);
    note_file(h->product.weights[0]);
  } else if (auto* d = std::get_if<AdaptInstruction>(&instruction)) {
    check(*d);
  }
  instructions_.push_back(std::move(instruction));
  capacity_ = 0;
}

void Program::set_head(MatmulInstruction head) {
  if (hidden_ < 0) throw std::invalid_argument("finish() comes before head()");
  const Matrix& w = head.weights.at(0)->matrix();
  if (w.columns != hidden_width() || (!head.norm.empty() && head.norm.width() != w.columns)) {
    throw std::invalid_argument("the head does not fit the hidden states");
  }
  widest_input_ = std::max(widest_input_, padded(w.columns));
  note_file(head.weights.at(0));
  head_ = std::move(head);
  capacity_ = 0;
}

void Program::note_file(const Weights& weights) {
  const auto& file = weights->file();
  if (file && std::find(files_.begin(), files_.end(), file) == files_.end()) files_.push_back(file);
}

void Program::check_files() const {
  for (const auto& file : files_) file->check();
}

std::size_t Program::nbytes() const {
  std::size_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.memory.size();
  total += expert_inner_.size() + expert_outer_.size() + heads_input_.size() + low_rank_.size();
  auto inputs = [](const Inputs& in) {
    std::size_t bytes = in.floats.size() + in.bfloats.size() + in.rest.size();
    bytes += in.rotated.size() + in.rotated_bfloats.size();
    for (int slot = 0; slot < kForms; ++slot) bytes += in.main[slot].size() + in.fine[slot].size();
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
  bool used[kForms] = {};
  std::int64_t most_rows = rows, most_numbers = rows * widest_input_, by_head = 0;
  for (const Instruction& instruction : instructions_) {
    if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) {
      mark_forms(*m, used);
    } else if (const auto* x = std::get_if<ExpertsInstruction>(&instruction)) {
      mark_forms(x->all_inner, used);
      mark_forms(x->all_down, used);
      const std::int64_t pairs = rows * x->routing.chosen;
      most_rows = std::max(most_rows, pairs);
      for (const MatmulInstruction* all : {&x->all_inner, &x->all_down})
        most_numbers = std::max(most_numbers, pairs * padded(all->weights[0]->matrix().columns));
    } else if (const auto* h = std::get_if<HeadsInstruction>(&instruction); h && !h->backward) {
      mark_forms(h->product, used);
      most_rows = std::max(most_rows, rows * h->heads);
      by_head = std::max(by_head, rows * h->heads * padded(h->product.weights[0]->matrix().columns));
    }
  }
  most_numbers = std::max(most_numbers, by_head);
  if (by_head > 0) heads_input_ = AlignedBytes(static_cast<std::size_t>(by_head) * 4);
  if (head_) mark_forms(*head_, used);
  const bool int8 = compute_ == Compute::int8;
  for (Buffer& buffer : buffers_) buffer.memory = AlignedBytes(static_cast<std::size_t>(rows * buffer.stride) * 4);
  shared_->reserve(most_rows, most_numbers, used, int8, bfloats);
  if (mixtures_ > 0) reserve_experts(rows);
  if (adapters_ > 0) low_rank_ = AlignedBytes(static_cast<std::size_t>(rows * low_rank_width_) * 4);
  const std::int64_t widest = std::max<std::int64_t>(1, widest_input_);  // 0 without a product
  const std::int64_t few = std::max<std::int64_t>(1, std::min(rows, kRedundantInput / widest));
  for (auto& scratch : scratch_) scratch->inputs->reserve(few, few * widest_input_, used, int8, bfloats);
  capacity_ = rows;
}

void Program::run(const Pass& pass) {
  if (hidden_ < 0) throw std::invalid_argument("the program is not finished");
  const auto row_of = [&pass](const EmbedInstruction& e, std::int64_t r) {
    if (e.of == Rows::tokens) return pass.ids[r];
    if (e.of == Rows::positions) return std::int64_t{pass.position[r]} + e.first;
    return pass.types ? pass.types[r] : 0;
  };
  for (const Instruction& i : instructions_) {
    const auto* given = std::get_if<GivenInstruction>(&i);
    if (given && (!pass.features || pass.feature_width != buffer_width(given->out))) {
      throw std::invalid_argument("the pass brings no features of its rows, or too few or too many of each");
    }
    const auto* e = std::get_if<EmbedInstruction>(&i);
    for (std::int64_t r = 0; e && r < pass.rows; ++r) {
      if (row_of(*e, r) >= 0 && row_of(*e, r) < e->weights->matrix().rows) continue;
      if (e->of == Rows::positions) throw std::invalid_argument("a position is beyond the model's last");
      throw std::invalid_argument(e->of == Rows::tokens ? "a token id is outside the vocabulary" : "no such token type");
    }
  }
  for (std::int64_t i = 0; i < pass.logits_rows; ++i) {
    if (pass.logits_row[i] < 0 || pass.logits_row[i] >= pass.rows) throw std::invalid_argument("no such row for logits");
  }
  reserve(std::max(pass.rows, pass.logits_rows));
  const Kernels& kernels = *context_->kernels;
  auto at = [&](int index) -> Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  for (const Instruction& i : instructions_) {
    const auto* n = std::get_if<RotateInstruction>(&i);
    if (n && n->first + n->half > pass.table_half) throw std::invalid_argument("the rotary tables have too few columns");
  }
  prepare_attention(pass);
  prepare_states(pass);
  prepare_adapters(pass);
  context_->team->run([&](Worker& worker) {
    for (const Instruction& instruction : instructions_) {
      if (const auto* m = std::get_if<MatmulInstruction>(&instruction)) {
        matmul(worker, *m, at(m->x).data(), at(m->x).stride, nullptr, pass.rows, nullptr, 0);
      } else if (const auto* a = std::get_if<AttendInstruction>(&instruction)) {
        attend(worker, *a, pass);
      } else if (const auto* t = std::get_if<RecurInstruction>(&instruction)) {
        recur(worker, *t, pass);
      } else if (const auto* c = std::get_if<ConvolveInstruction>(&instruction)) {
        convolve(worker, *c, pass);
      } else if (const auto* e = std::get_if<EmbedInstruction>(&instruction)) {
        worker.for_each(pass.rows, 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            kernels.decode_row(e->weights->matrix(), row_of(*e, r), at(e->out).data() + r * at(e->out).stride);
        });
      } else if (const auto* v = std::get_if<GivenInstruction>(&instruction)) {
        const std::int64_t width = at(v->out).width;
        worker.for_each(pass.rows, 16, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            std::memcpy(at(v->out).data() + r * at(v->out).stride, pass.features + r * width,
                        static_cast<std::size_t>(width) * 4);
        });
      } else if (const auto* n = std::get_if<NormInstruction>(&instruction)) {
        norm(worker, *n, pass.rows);
      } else if (const auto* p = std::get_if<MapInstruction>(&instruction)) {
        map(worker, *p, pass.rows);
      } else if (const auto* o = std::get_if<RotateInstruction>(&instruction)) {
        rotate(worker, *o, pass);
      } else if (const auto* q = std::get_if<MultiplyInstruction>(&instruction)) {
        multiply(worker, *q, pass.rows);
      } else if (const auto* f = std::get_if<FitInstruction>(&instruction)) {
        fit_heads(worker, *f, pass.rows);
      } else if (const auto* x = std::get_if<ExpertsInstruction>(&instruction)) {
        mix(worker, *x, pass.rows);
      } else if (const auto* h = std::get_if<HeadsInstruction>(&instruction)) {
        h->backward ? multiply_heads_backward(worker, *h, pass.rows) : multiply_heads(worker, *h, pass.rows);
      } else if (const auto* d = std::get_if<AdaptInstruction>(&instruction)) {
        adapt(worker, *d);
      } else if (const auto* l = std::get_if<GateInstruction>(&instruction)) {
        sigmoid_gate(worker, *l, pass.rows);
      } else if (const auto* s = std::get_if<AddInstruction>(&instruction)) {
        worker.for_each(pass.rows, 4, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r) {
            float* out = at(s->out).data() + r * at(s->out).stride;
            std::memcpy(out, at(s->x).data() + r * at(s->x).stride, static_cast<std::size_t>(at(s->out).width) * 4);
            kernels.add(at(s->y).data() + r * at(s->y).stride, out, at(s->out).width);
          }
        });
      } else if (const auto* j = std::get_if<ColumnsInstruction>(&instruction)) {
        worker.for_each(pass.rows, 16, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r)
            std::memcpy(at(j->out).data() + r * at(j->out).stride, at(j->x).data() + r * at(j->x).stride + j->first,
                        static_cast<std::size_t>(at(j->out).width) * 4);
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
        finish_logits(worker, pass.logits_rows, pass.out);
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
  context_->team->run([&](Worker& worker) {
    matmul(worker, *head_, buffer.data(), buffer.stride, nullptr, rows, out, vocabulary());
    finish_logits(worker, rows, out);
  });
}

}  // namespace kbit
