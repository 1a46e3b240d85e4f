// Mixtures of experts: who goes where, the chosen experts' products on the rows that come to them, and their weighted
// sums. kernels/reference_experts.py says what it means.
//
// Rows are brought together by expert, so each chosen expert's matrices are read once a pass and those of others not at
// all. A row's result does not depend on who else is there: its products are as they are alone, and its sum has its
// experts in ascending order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "program/program_scratch.h"

namespace kbit {
namespace {

// As in program_matmul.cpp.
constexpr std::int64_t kRowBlock = 256, kFewRows = 64;
// Up to so many rows, one member routes them all: less than waiting for the others.
constexpr std::int64_t kRoutedAlone = 8;

// A row times a number, filled up with zeros.
void scale_row(const float* row, float factor, float* out, std::int64_t width, std::int64_t stride) {
  for (std::int64_t k = 0; k < width; ++k) out[k] = factor * row[k];
  std::fill(out + width, out + stride, 0.0f);
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// The `count` best of `candidates` indices whose flag is set, the lower index first among equals: their flags become 2.
template <typename Value>
void mark_best(const Value* ranked, std::uint8_t* flags, int candidates, int count) {
  for (int taken = 0; taken < count; ++taken) {
    int best = -1;
    for (int i = 0; i < candidates; ++i)
      if (flags[i] == 1 && (best < 0 || ranked[i] > ranked[best])) best = i;
    flags[best] = 2;
  }
}

// Sum of the two largest of a group.
float best_two(const float* ranked, int count) {
  float first = ranked[0], second = ranked[1];
  if (second > first) std::swap(first, second);
  for (int i = 2; i < count; ++i) {
    if (ranked[i] > first) {
      second = first;
      first = ranked[i];
    } else if (ranked[i] > second) {
      second = ranked[i];
    }
  }
  return first + second;
}

// Two experts, one after the other (SparseMixer): the best of those left, whose weight is its share of the softmax over
// those left that come near it.
void choose_sparsely(const Routing& routing, const float* logits, std::int32_t* chosen, float* weights) {
  int taken = -1;
  for (int turn = 0; turn < 2; ++turn) {
    int best = taken == 0 ? 1 : 0;
    for (int e = best + 1; e < routing.experts; ++e)
      if (e != taken && logits[e] > logits[best]) best = e;
    const float most = logits[best];
    double total = 0.0;
    for (int e = 0; e < routing.experts; ++e) {
      const bool far = (most - logits[e]) / std::max(std::abs(logits[e]), most) > 2.0f * routing.jitter;
      if (e != taken && !far) total += std::exp(static_cast<double>(logits[e]) - most);
    }
    chosen[turn] = best;
    weights[turn] = static_cast<float>(1.0 / total) * routing.scale;
    taken = best;
  }
  if (chosen[0] > chosen[1]) {
    std::swap(chosen[0], chosen[1]);
    std::swap(weights[0], weights[1]);
  }
}

// One row: its experts in ascending order and their weights. scratch: room for what is said of every expert.
void route_row(const Routing& routing, const std::vector<float>& bias, const std::vector<float>& scales,
               const float* logits, std::uint8_t* scratch, std::int32_t* chosen, float* weights) {
  const int experts = routing.experts;
  if (routing.score == Score::sparsemixer) return choose_sparsely(routing, logits, chosen, weights);
  auto* scores = reinterpret_cast<double*>(scratch);
  auto* ranked = reinterpret_cast<float*>(scores + experts);
  auto* sums = ranked + experts;  // what speaks for a group
  auto* flags = reinterpret_cast<std::uint8_t*>(sums + experts);
  auto* group_flags = flags + experts;
  double largest = logits[0];
  for (int e = 0; e < experts; ++e) {
    largest = std::max(largest, static_cast<double>(logits[e]));
    scores[e] = routing.score == Score::sigmoid ? sigmoid(logits[e]) : static_cast<double>(logits[e]);
    ranked[e] = static_cast<float>(scores[e]) + (bias.empty() ? 0.0f : bias[static_cast<std::size_t>(e)]);
    flags[e] = 1;
  }
  if (routing.score == Score::softmax && !bias.empty()) {  // which is added to shares, not to logits
    double sum = 0.0;
    for (int e = 0; e < experts; ++e) sum += std::exp(scores[e] - largest);
    for (int e = 0; e < experts; ++e)
      ranked[e] = static_cast<float>(std::exp(scores[e] - largest) / sum) + bias[static_cast<std::size_t>(e)];
  }
  if (routing.groups > 1) {
    const int size = experts / routing.groups;
    for (int g = 0; g < routing.groups; ++g) {
      const float* of_group = ranked + g * size;
      sums[g] = routing.best_of_group ? *std::max_element(of_group, of_group + size) : best_two(of_group, size);
      group_flags[g] = 1;
    }
    mark_best(sums, group_flags, routing.groups, routing.chosen_groups);
    for (int e = 0; e < experts; ++e) flags[e] = group_flags[e / size] == 2 ? 1 : 0;
  }
  mark_best(ranked, flags, experts, routing.chosen);
  double total = 1.0;
  if (routing.score != Score::sigmoid) {
    total = 0.0;
    for (int e = 0; e < experts; ++e) {
      scores[e] = std::exp(scores[e] - largest);
      if (routing.score == Score::softmax || flags[e] == 2) total += scores[e];
    }
  }
  float sum = 0.0f;
  int found = 0;
  for (int e = 0; e < experts; ++e) {
    if (flags[e] != 2) continue;
    chosen[found] = e;
    weights[found] = static_cast<float>(scores[e] / total);
    sum += weights[found++];
  }
  for (int i = 0; i < found; ++i) {
    weights[i] = (routing.normalise ? weights[i] / sum : weights[i]) * routing.scale;
    if (!scales.empty()) weights[i] *= scales[static_cast<std::size_t>(chosen[i])];
  }
}

}  // namespace

void Program::check(const ExpertsInstruction& m) const {
  const auto count = static_cast<std::size_t>(m.routing.experts);
  const Routing& r = m.routing;
  const int size = r.groups > 0 ? r.experts / r.groups : 0;
  if (r.experts < 1 || r.chosen < 1 || r.groups < 1 || size * r.groups != r.experts || r.chosen_groups < 1 ||
      r.chosen_groups > r.groups || r.chosen > r.chosen_groups * size || (r.groups > 1 && size < 2) ||
      std::int64_t{r.experts} * 18 > kMatmulScratch || (r.score == Score::sparsemixer && (r.chosen != 2 || r.groups != 1))) {
    throw std::invalid_argument("so many experts, or groups of them, cannot be chosen");
  }
  if (m.inner.size() != count || m.down.size() != count ||
      (!m.selection_bias.empty() && m.selection_bias.size() != count) ||
      (!m.scales.empty() && m.scales.size() != count) || buffer_width(m.logits) != r.experts) {
    throw std::invalid_argument("there are not as many matrices, biases or logits as experts");
  }
  const std::int64_t width = m.inner[0].weights.at(0)->matrix().rows;
  const auto fits = [](const MatmulInstruction& product, std::size_t matrices, std::int64_t rows, std::int64_t columns) {
    bool good = product.weights.size() == matrices && product.biases.size() == matrices;
    for (std::size_t i = 0; good && i < matrices; ++i) {
      const Matrix& w = product.weights[i]->matrix();
      const auto bias = static_cast<std::int64_t>(product.biases[i].size());
      good = w.rows == rows && w.columns == columns && (bias == 0 || bias == rows);
    }
    return good;
  };
  for (std::size_t e = 0; e < count; ++e) {
    if (!fits(m.inner[e], 2, width, buffer_width(m.x)) || !fits(m.down[e], 1, buffer_width(m.out), width)) {
      throw std::invalid_argument("an expert's matrices do not fit each other or their buffers");
    }
  }
  if (m.out == m.x || m.out == m.logits) throw std::invalid_argument("experts cannot write over their input");
}

// Room for what each mixture notes of a pass, and for the rows inside experts.
void Program::reserve_experts(std::int64_t rows) {
  std::int64_t inner = 0, outer = 0;
  expert_rows_.clear();
  for (const Instruction& instruction : instructions_) {
    const auto* m = std::get_if<ExpertsInstruction>(&instruction);
    if (!m) continue;
    const std::int64_t pairs = rows * m->routing.chosen;
    inner = std::max(inner, pairs * padded(m->inner[0].weights[0]->matrix().rows));
    outer = std::max(outer, pairs * padded(buffer_width(m->out)));
    auto noted = std::make_unique<ExpertRows>();
    noted->chosen.resize(static_cast<std::size_t>(pairs));
    noted->weights.resize(static_cast<std::size_t>(pairs));
    noted->places.resize(static_cast<std::size_t>(pairs));
    noted->rows.resize(static_cast<std::size_t>(pairs));
    noted->sorted_weights.resize(static_cast<std::size_t>(pairs));
    noted->begins.resize(static_cast<std::size_t>(m->routing.experts) + 1);
    noted->spans.reserve(static_cast<std::size_t>(std::min<std::int64_t>(pairs, m->routing.experts)));
    expert_rows_.push_back(std::move(noted));
  }
  expert_inner_ = AlignedBytes(static_cast<std::size_t>(std::max<std::int64_t>(inner, 1)) * 4);
  expert_outer_ = AlignedBytes(static_cast<std::size_t>(std::max<std::int64_t>(outer, 1)) * 4);
}

// Rows by expert, and the pieces of the products: blocks of rows, and panels of each.
void Program::group_rows(const ExpertsInstruction& m, ExpertRows& noted, std::int64_t rows) const {
  const std::int64_t chosen = m.routing.chosen, pairs = rows * chosen;
  std::fill(noted.begins.begin(), noted.begins.end(), 0);
  for (std::int64_t i = 0; i < pairs; ++i) ++noted.begins[static_cast<std::size_t>(noted.chosen[i]) + 1];
  for (std::size_t e = 1; e < noted.begins.size(); ++e) noted.begins[e] += noted.begins[e - 1];
  noted.spans.clear();
  noted.longest = 0;
  std::int64_t units[2] = {0, 0};
  for (int e = 0; e < m.routing.experts; ++e) {
    const std::int64_t begin = noted.begins[static_cast<std::size_t>(e)], end = noted.begins[static_cast<std::size_t>(e) + 1];
    if (begin == end) continue;
    noted.longest = std::max(noted.longest, end - begin);
    noted.spans.push_back({e, begin, end, {units[0], units[1]}});
    const std::int64_t blocks = (end - begin + kRowBlock - 1) / kRowBlock;
    units[0] += blocks * m.inner[static_cast<std::size_t>(e)].weights[0]->matrix().panels;
    units[1] += blocks * m.down[static_cast<std::size_t>(e)].weights[0]->matrix().panels;
  }
  noted.units[0] = units[0];
  noted.units[1] = units[1];
  for (std::int64_t i = 0; i < pairs; ++i) {  // begins[e] moves on to where the next row of e goes
    const std::int64_t place = noted.begins[static_cast<std::size_t>(noted.chosen[i])]++;
    noted.places[static_cast<std::size_t>(i)] = place;
    noted.rows[static_cast<std::size_t>(place)] = i / chosen;
    noted.sorted_weights[static_cast<std::size_t>(place)] = noted.weights[static_cast<std::size_t>(i)];
  }
}

// One product of every chosen expert with its rows, which lie one after another in `inputs`; or, where there is a single
// row in all, with that. out: (pairs, stride).
void Program::multiply_experts(Worker& worker, const std::vector<MatmulInstruction>& products, const ExpertRows& noted,
                               int which, const Inputs& inputs, bool single, float* out, std::int64_t stride) {
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const Matrix& first = products[static_cast<std::size_t>(noted.spans[0].expert)].weights[0]->matrix();
  std::int64_t grain = 2;
  const std::int64_t units = noted.units[which];
  if (noted.longest <= kFewRows) {  // as in Program::matmul
    const std::int64_t bytes = first.bits ? first.panel_bytes() : first.tiles * kTileWeights * bytes_of(first.value_kind);
    grain = std::clamp<std::int64_t>((256 << 10) / std::max<std::int64_t>(1, bytes), 1,
                                     (units + worker.size() - 1) / worker.size());
  }
  grain = std::clamp<std::int64_t>(kStaging / (std::min(noted.longest, kRowBlock) * kPanelRows), 1, grain);
  worker.for_each(units, grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const auto after = std::upper_bound(noted.spans.begin(), noted.spans.end(), begin,
                                          [&](std::int64_t unit, const ExpertRows::Span& s) { return unit < s.first_unit[which]; });
      const ExpertRows::Span& span = *(after - 1);
      const MatmulInstruction& product = products[static_cast<std::size_t>(span.expert)];
      const std::int64_t panels = product.weights[0]->matrix().panels, unit = begin - span.first_unit[which];
      const std::int64_t panel = unit % panels, row = span.begin + unit / panels * kRowBlock;
      const std::int64_t stop = std::min(panels, panel + end - begin);
      const std::int64_t row_end = std::min(span.end, row + kRowBlock);
      if (single) {
        matmul_block(product, inputs, scratch, 0, 0, 1, panel, stop, out + row * stride, stride);
      } else {
        matmul_block(product, inputs, scratch, 0, row, row_end, panel, stop, out, stride);
      }
      begin += stop - panel;
    }
  });
}

void Program::mix(Worker& worker, const ExpertsInstruction& m, std::int64_t rows) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  const Buffer &x = at(m.x), &logits = at(m.logits), &out = at(m.out);
  ExpertRows& noted = *expert_rows_[static_cast<std::size_t>(m.index)];
  Scratch& scratch = *scratch_[static_cast<std::size_t>(worker.index())];
  const std::int64_t chosen = m.routing.chosen, pairs = rows * chosen;
  const auto route = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      route_row(m.routing, m.selection_bias, m.scales, logits.data() + r * logits.stride, scratch.kernel.data(),
                noted.chosen.data() + r * chosen, noted.weights.data() + r * chosen);
    }
  };
  // What is noted is of this mixture alone, and stays until the pass is over: a member that is behind finds in it the
  // numbers of its loops.
  if (rows > kRoutedAlone) worker.for_each(rows, 8, route);
  worker.for_each(1, 1, [&](std::int64_t, std::int64_t) {
    if (rows <= kRoutedAlone) route(0, rows);
    group_rows(m, noted, rows);
  });

  float* inner = reinterpret_cast<float*>(expert_inner_.data());
  float* outer = reinterpret_cast<float*>(expert_outer_.data());
  const std::int64_t inner_stride = padded(m.inner[0].weights[0]->matrix().rows), outer_stride = out.stride;
  const bool single = rows == 1 && !m.routing.scales_input;  // which all of its experts read
  Inputs* inputs = shared_.get();
  if (single) {
    inputs = scratch.inputs.get();
    if (!worker.nothing_left(noted.units[0])) prepare_rows(m.all_inner, *inputs, x.data(), x.stride, nullptr, 0, 1);
  } else {
    worker.for_each(pairs, 4, [&](std::int64_t begin, std::int64_t end) {
      if (!m.routing.scales_input) {
        prepare_rows(m.all_inner, *inputs, x.data(), x.stride, noted.rows.data(), begin, end);
        return;
      }
      for (std::int64_t place = begin; place < end; ++place) {
        const float weight = noted.sorted_weights[static_cast<std::size_t>(place)];
        const float* row = x.data() + noted.rows[static_cast<std::size_t>(place)] * x.stride;
        scale_row(row, weight, outer + place * outer_stride, x.width, outer_stride);
      }
      prepare_rows(m.all_inner, *inputs, outer, outer_stride, nullptr, begin, end);
    });
  }
  multiply_experts(worker, m.inner, noted, 0, *inputs, single, inner, inner_stride);
  worker.for_each(pairs, 4, [&](std::int64_t begin, std::int64_t end) {
    prepare_rows(m.all_down, *shared_, inner, inner_stride, nullptr, begin, end);
  });
  multiply_experts(worker, m.down, noted, 1, *shared_, false, outer, outer_stride);
  worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      float* to = out.data() + r * out.stride;
      std::fill(to, to + out.width, 0.0f);
      for (std::int64_t i = r * chosen; i < (r + 1) * chosen; ++i) {
        const float weight = m.routing.scales_input ? 1.0f : noted.weights[static_cast<std::size_t>(i)];
        const float* from = outer + noted.places[static_cast<std::size_t>(i)] * outer_stride;
        for (std::int64_t k = 0; k < out.width; ++k) to[k] += weight * from[k];
      }
    }
  });
}

void Program::sigmoid_gate(Worker& worker, const GateInstruction& g, std::int64_t rows) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  const Buffer &x = at(g.x), &gate = at(g.gate), &out = at(g.out);
  worker.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      if (gate.width > 1) {
        context_->kernels->activate(gate.data() + r * gate.stride, x.data() + r * x.stride, out.data() + r * out.stride,
                                    x.width, Activation::sigmoid);
        continue;
      }
      const auto factor = static_cast<float>(sigmoid(gate.data()[r * gate.stride]));
      for (std::int64_t k = 0; k < x.width; ++k) out.data()[r * out.stride + k] = factor * x.data()[r * x.stride + k];
    }
  });
}

}  // namespace kbit
