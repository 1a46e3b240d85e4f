// What goes by sequences: attention to their pages, and the states of recurrent layers.
#include <algorithm>
#include <stdexcept>

#include "attention/kv_pages.h"
#include "program/program.h"
#include "program/program_scratch.h"

namespace kbit {

int Program::plan_of(const AttendInstruction& a) {
  for (std::size_t i = 0; i < plans_.size(); ++i) {
    const AttentionHeads& of = plans_[i].first;
    if (of.crosses == a.crosses() && of.heads == a.heads && of.kv_heads == a.kv_heads && of.head_dim == a.head_dim) {
      return static_cast<int>(i);
    }
  }
  plans_.emplace_back(AttentionHeads{a.crosses(), a.heads, a.kv_heads, a.head_dim}, std::make_unique<AttentionScratch>());
  return static_cast<int>(plans_.size()) - 1;
}

void Program::attend(Worker& worker, const AttendInstruction& a, const Pass& pass) {
  const auto at = [&](int index) -> const Buffer& { return buffers_[static_cast<std::size_t>(index)]; };
  AttentionArgs args{};
  if (!a.stores()) {
    args.q = at(a.q).data();
    args.out = at(a.out).data();
    args.q_stride = at(a.q).stride;
    args.out_stride = at(a.out).stride;
  }
  if (a.k >= 0) {
    args.k = at(a.k).data();
    args.v = at(a.v).data();
    args.k_stride = at(a.k).stride;
    args.v_stride = at(a.v).stride;
  }
  args.rows = pass.rows;
  args.sequence = pass.sequence;
  args.position = pass.position;
  args.cos = pass.cos;
  args.sin = pass.sin;
  args.rope_row = pass.rope_row;
  args.rotated_half = !a.rotary ? 0 : a.angles < 0 ? pass.table_half : a.angles;
  args.angle_stride = pass.table_half;
  args.cos += a.first_angle;
  args.sin += a.first_angle;
  args.heads = a.heads;
  args.kv_heads = a.kv_heads;
  args.head_dim = a.head_dim;
  args.scale = a.scale;
  args.soft_cap = a.soft_cap;
  args.sinks = a.sinks.empty() ? nullptr : a.sinks.data();
  args.window = a.window;
  args.chunked = a.chunked;
  if (!a.by_distance.empty()) {
    args.by_distance = a.by_distance.data();
    args.reach = static_cast<int>((static_cast<std::int64_t>(a.by_distance.size()) / a.heads - 1) / 2);
  }
  args.cache = a.crosses() ? pass.encoder.cache : pass.cache;
  args.tables = a.crosses() ? pass.encoder.tables : pass.tables;
  args.table_stride = a.crosses() ? pass.encoder.table_stride : pass.table_stride;
  args.layer = a.layer;
  AttentionScratch& scratch = *plans_[static_cast<std::size_t>(a.plan)].second;
  if (!a.key_bias.empty()) {
    args.key_bias = a.key_bias.data();
    args.angles = scratch.angles();
  }
  attention(context_->kernels->attention, worker, args, scratch);
}

void Program::prepare_attention(const Pass& pass) {
  bool crosses = false;
  std::vector<bool> biased(plans_.size(), false);
  for (const Instruction& instruction : instructions_) {
    const auto* a = std::get_if<AttendInstruction>(&instruction);
    if (!a) continue;
    const int half = a->angles < 0 ? pass.table_half : a->angles;
    const KVPages* cache = a->crosses() ? pass.encoder.cache : pass.cache;
    if (!cache) throw std::invalid_argument("the program attends to an encoder's texts, and there are none");
    if (a->layer >= cache->layers()) throw std::invalid_argument("the cache has too few layers");
    const CacheView& view = cache->view(a->layer);
    if (view.kv_heads != a->kv_heads || view.head_dim != a->head_dim || view.latent != a->latent ||
        (a->rotary && (2 * half > a->head_dim || a->first_angle + half > pass.table_half))) {
      throw std::invalid_argument("the cache or the rotary tables do not fit the program's heads");
    }
    if (!a->key_bias.empty() && a->rotary && half != pass.table_half) {
      throw std::invalid_argument("keys with a bias are turned by all columns of the rotary tables");
    }
    if (!a->key_bias.empty() && a->rotary && view.key_bits < 16) biased[static_cast<std::size_t>(a->plan)] = true;
    crosses = crosses || a->crosses();
  }
  if (crosses) {
    encoder_ends_.resize(static_cast<std::size_t>(pass.rows));
    for (std::int64_t r = 0; r < pass.rows; ++r) {
      encoder_ends_[static_cast<std::size_t>(r)] = pass.encoder.lengths[pass.sequence[r]] - 1;
    }
  }
  for (std::size_t i = 0; i < plans_.size(); ++i) {
    auto& [of, scratch] = plans_[i];
    if (biased[i]) prepare_angles(pass, *scratch);
    scratch->prepare(pass.rows, pass.sequence, pass.position, of.heads, of.kv_heads, of.head_dim, context_->team->size(),
                     of.crosses ? encoder_ends_.data() : pass.last_seen);
  }
}

void Program::prepare_states(const Pass& pass) {
  sequences_.clear();
  for (const Instruction& instruction : instructions_) {
    const auto* recur = std::get_if<RecurInstruction>(&instruction);
    const auto* convolve = std::get_if<ConvolveInstruction>(&instruction);
    if (!recur && !convolve) continue;
    const auto state = static_cast<std::size_t>(recur ? recur->state : convolve->state);
    const std::int64_t size = recur ? std::int64_t{recur->heads} * recur->key_dim * recur->value_dim
                                    : (convolve->width - 1) * buffer_width(convolve->x);
    if (state >= pass.states.size() || pass.states[state].size != size) {
      throw std::invalid_argument("the cache does not have the states of the program's recurrent layers");
    }
  }
  if (pass.states.empty()) return;
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    const std::int32_t sequence = pass.sequence[r];
    if (r > 0 && sequence == pass.sequence[r - 1]) {
      ++sequences_.back().end;
    } else {
      sequences_.push_back({r, r + 1, pass.state_before[sequence], pass.state_after[sequence]});
    }
  }
}

void Program::recur(Worker& worker, const RecurInstruction& n, const Pass& pass) {
  const auto rows = [&](int index) {
    const Buffer& buffer = buffers_[static_cast<std::size_t>(index)];
    return RowsView{buffer.data(), buffer.stride};
  };
  const RowsView x = rows(n.x), decay = rows(n.decay), write = rows(n.write), out = rows(n.out);
  const StateView& state = pass.states[static_cast<std::size_t>(n.state)];
  float* scratch = reinterpret_cast<float*>(scratch_[static_cast<std::size_t>(worker.index())]->kernel.data());
  const std::int64_t parts = (n.value_dim + kRecurred - 1) / kRecurred, each = n.heads * parts;
  const std::int64_t matrix = std::int64_t{n.key_dim} * n.value_dim, keys = std::int64_t{n.key_heads} * n.key_dim;
  worker.for_each(static_cast<std::int64_t>(sequences_.size()) * each, 1, [&](std::int64_t i, std::int64_t) {
    const SequenceRows& sequence = sequences_[static_cast<std::size_t>(i / each)];
    const std::int64_t head = i % each / parts, first = i % parts * kRecurred, place = head * matrix + first;
    const std::int64_t of_key = head / (n.heads / n.key_heads) * n.key_dim, of_value = head * n.value_dim + first;
    const float* row = x.at(sequence.begin);
    RecurrenceTask task{};
    const bool sums = !n.skips.empty();
    const std::int64_t values = std::int64_t{n.heads} * n.value_dim;
    task.q = row + (sums ? values + keys : 0) + of_key;
    task.k = row + (sums ? values : keys) + of_key;
    task.v = row + (sums ? 0 : 2 * keys) + of_value;
    task.decay = decay.at(sequence.begin) + head;
    task.write = write.at(sequence.begin) + head;
    task.out = out.at(sequence.begin) + of_value;
    task.x_stride = x.stride;
    task.decay_stride = decay.stride;
    task.write_stride = write.stride;
    task.out_stride = out.stride;
    task.rows = sequence.end - sequence.begin;
    task.key_dim = n.key_dim;
    task.columns = static_cast<int>(std::min<std::int64_t>(kRecurred, n.value_dim - first));
    task.log_rate = n.log_rates[static_cast<std::size_t>(head)];
    task.before = sequence.before < 0 ? nullptr : state.data + sequence.before * state.size + place;
    task.after = state.data + sequence.after * state.size + place;
    task.state_stride = n.value_dim;
    task.scratch = scratch;
    if (sums) {
      task.skip = n.skips[static_cast<std::size_t>(head)];
      return context_->kernels->state_space(task);
    }
    context_->kernels->gated_delta(task);
  });
}

void Program::convolve(Worker& worker, const ConvolveInstruction& n, const Pass& pass) {
  const Buffer &x = buffers_[static_cast<std::size_t>(n.x)], &out = buffers_[static_cast<std::size_t>(n.out)];
  const StateView& state = pass.states[static_cast<std::size_t>(n.state)];
  const std::int64_t parts = (x.width + kConvolved - 1) / kConvolved;
  worker.for_each(static_cast<std::int64_t>(sequences_.size()) * parts, 1, [&](std::int64_t i, std::int64_t) {
    const std::int64_t first = i % parts * kConvolved;
    short_convolution({x.data(), x.stride}, {out.data(), out.stride}, n.weight.data(),
                      n.bias.empty() ? nullptr : n.bias.data(), n.width, x.width, state,
                      sequences_[static_cast<std::size_t>(i / parts)], first, std::min(x.width, first + kConvolved));
  });
}

void Program::prepare_angles(const Pass& pass, AttentionScratch& scratch) {
  std::int64_t stop = 0;
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    if (pass.rope_row[r] != pass.position[r]) {
      throw std::invalid_argument("keys with a bias need rotary tables by position");
    }
    stop = std::max(stop, std::int64_t{pass.position[r]} + 1);
  }
  scratch.prepare_angles(pass.cos, pass.sin, pass.table_half, stop);
}

}  // namespace kbit
