#include "program/recurrence.h"

#include <algorithm>
#include <cmath>

namespace kbit {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// x times factor / sqrt(sum(x^2) + eps). The sum in 16 lanes, which compilers turn into vectors.
void unit(const float* x, int count, float factor, float* out) {
  float lanes[16] = {}, sum = 0.0f;
  for (int i = 0; i < count; ++i) lanes[i % 16] += x[i] * x[i];
  for (const float lane : lanes) sum += lane;
  factor *= 1.0f / std::sqrt(sum + 1e-6f);
  for (int i = 0; i < count; ++i) out[i] = x[i] * factor;
}

}  // namespace

void gated_delta(const RecurrenceArgs& a, const StateView& state, const SequenceRows& rows, int head, float* scratch) {
  const int keys = a.key_dim, values = a.value_dim;
  const std::int64_t matrix = std::int64_t{keys} * values;
  float* const s = state.data + rows.after * state.size + head * matrix;
  if (rows.before < 0) {
    std::fill(s, s + matrix, 0.0f);
  } else if (rows.before != rows.after) {
    const float* from = state.data + rows.before * state.size + head * matrix;
    std::copy(from, from + matrix, s);
  }
  float *q = scratch, *k = q + keys, *delta = k + keys;
  const float scale = 1.0f / std::sqrt(static_cast<float>(keys));
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    unit(a.q.at(row) + head * keys, keys, scale, q);
    unit(a.k.at(row) + head * keys, keys, 1.0f, k);
    const float* v = a.v.at(row) + head * values;
    float* out = a.out.at(row) + head * values;
    const float keep = sigmoid(a.decay.at(row)[head]), share = sigmoid(a.write.at(row)[head]);
    std::fill(delta, delta + values, 0.0f);
    for (int i = 0; i < keys; ++i) {  // what the state says to k
      float* line = s + std::int64_t{i} * values;
      for (int j = 0; j < values; ++j) {
        line[j] *= keep;
        delta[j] += line[j] * k[i];
      }
    }
    for (int j = 0; j < values; ++j) delta[j] = share * (v[j] - delta[j]);
    std::fill(out, out + values, 0.0f);
    for (int i = 0; i < keys; ++i) {
      float* line = s + std::int64_t{i} * values;
      for (int j = 0; j < values; ++j) {
        line[j] += k[i] * delta[j];
        out[j] += line[j] * q[i];
      }
    }
  }
}

void short_convolution(const RowsView& x, const RowsView& out, const float* weight, int width, std::int64_t features,
                       const StateView& state, const SequenceRows& rows, std::int64_t first, std::int64_t last) {
  const int before = width - 1;
  const float* old = rows.before < 0 ? nullptr : state.data + rows.before * state.size;
  // The input `back` tokens before the sequence's first row of this pass, of one feature.
  const auto earlier = [&](std::int64_t back, std::int64_t c) { return old ? old[(before - back) * features + c] : 0.0f; };
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    float* to = out.at(row);
    std::fill(to + first, to + last, 0.0f);
    for (int i = 0; i < width; ++i) {
      const std::int64_t from = row - before + i;
      const float* w = weight + i * features;
      for (std::int64_t c = first; c < last; ++c) {
        to[c] += w[c] * (from >= rows.begin ? x.at(from)[c] : earlier(rows.begin - from, c));
      }
    }
  }
  // The oldest first: what lies before this pass is read from slots that are written later, or are others.
  float* next = state.data + rows.after * state.size;
  for (int i = 0; i < before; ++i) {
    const std::int64_t from = rows.end - before + i;
    for (std::int64_t c = first; c < last; ++c) {
      next[i * features + c] = from >= rows.begin ? x.at(from)[c] : earlier(rows.begin - from, c);
    }
  }
}

}  // namespace kbit
