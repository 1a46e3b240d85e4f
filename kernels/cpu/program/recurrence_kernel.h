// The gated delta rule and state spaces, some columns of a state at a time: what happens to a column does not depend on the others.
#pragma once

#include <math.h>

#include "isa/kernels.h"

namespace {

// x times factor / sqrt(sum(x^2) + eps).
inline void unit_vector(const float* x, int count, float factor, float* out) {
  Floats squares = zero();
  for (int k = 0; k < count; k += 16) {
    const Floats part = load_first(x + k, count - k < 16 ? count - k : 16);
    squares = fma(part, part, squares);
  }
  const Floats scale = broadcast(factor / sqrtf(reduce_add(squares) + 1e-6f));
  for (int k = 0; k < count; k += 16) {
    const int n = count - k < 16 ? count - k : 16;
    store_first(out + k, mul(load_first(x + k, n), scale), n);
  }
}

inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

void gated_delta(const kbit::RecurrenceTask& t) {
  constexpr int kWide = kbit::kRecurred;
  float* const s = t.scratch;  // (key_dim, kWide), columns beyond the task's are zero
  float *const q = s + int64_t{t.key_dim} * kWide, *k = q + t.key_dim, *next_k = k + t.key_dim;
  float *const values = next_k + t.key_dim, *const out = values + kWide;
  for (int i = 0; i < t.key_dim; ++i) {
    float* line = s + int64_t{i} * kWide;
    for (int j = 0; j < kWide; j += 16) store(line + j, zero());
    if (t.before) memcpy(line, t.before + i * t.state_stride, size_t(t.columns) * 4);
  }
  memset(values, 0, 2 * kWide * sizeof(float));
  const float scale = 1.0f / sqrtf(float(t.key_dim)), rate = expf(t.log_rate);
  unit_vector(t.k, t.key_dim, 1.0f, k);
  // What the state says to k, in two sums for each column: rows of even and of odd index.
  Floats known[4] = {zero(), zero(), zero(), zero()};
  for (int i = 0; i < t.key_dim; ++i) {
    const float* line = s + int64_t{i} * kWide;
    const Floats key = broadcast(k[i]);
    Floats* sum = known + i % 2 * 2;
    sum[0] = fma(load(line), key, sum[0]);
    sum[1] = fma(load(line + 16), key, sum[1]);
  }
  for (int64_t row = 0; row < t.rows; ++row) {
    unit_vector(t.q + row * t.x_stride, t.key_dim, scale, q);
    memcpy(values, t.v + row * t.x_stride, size_t(t.columns) * 4);
    const Floats keep = broadcast(expf(-rate * softplus(t.decay[row * t.decay_stride])));
    const Floats share = broadcast(1.0f / (1.0f + expf(-t.write[row * t.write_stride])));
    Floats delta[2], said[4] = {zero(), zero(), zero(), zero()};
    for (int j = 0; j < 2; ++j)
      delta[j] = mul(share, sub(load(values + 16 * j), mul(keep, add(known[j], known[2 + j]))));
    for (Floats& sum : known) sum = zero();
    // In one go over the state: this token goes in, it is asked q, and what the next token's k will be told.
    const bool more = row + 1 < t.rows;
    if (more) unit_vector(t.k + (row + 1) * t.x_stride, t.key_dim, 1.0f, next_k);
    for (int i = 0; i < t.key_dim; ++i) {
      float* line = s + int64_t{i} * kWide;
      const Floats key = broadcast(k[i]), query = broadcast(q[i]), later = broadcast(more ? next_k[i] : 0.0f);
      const int half = i % 2 * 2;
      for (int j = 0; j < 2; ++j) {
        const Floats next = fma(key, delta[j], mul(keep, load(line + 16 * j)));
        store(line + 16 * j, next);
        said[half + j] = fma(next, query, said[half + j]);
        known[half + j] = fma(next, later, known[half + j]);
      }
    }
    for (int j = 0; j < 2; ++j) store(out + 16 * j, add(said[j], said[2 + j]));
    memcpy(t.out + row * t.out_stride, out, size_t(t.columns) * 4);
    float* const done = k;
    k = next_k;
    next_k = done;
  }
  for (int i = 0; i < t.key_dim; ++i) memcpy(t.after + i * t.state_stride, s + int64_t{i} * kWide, size_t(t.columns) * 4);
}

// kernels/reference_recurrent.py, state_space. write is not read: a step is both.
void state_space(const kbit::RecurrenceTask& t) {
  constexpr int kWide = kbit::kRecurred;
  float* const s = t.scratch;  // (key_dim, kWide), columns beyond the task's are zero
  float *const values = s + int64_t{t.key_dim} * kWide, *const out = values + kWide;
  for (int i = 0; i < t.key_dim; ++i) {
    float* line = s + int64_t{i} * kWide;
    for (int j = 0; j < kWide; j += 16) store(line + j, zero());
    if (t.before) memcpy(line, t.before + i * t.state_stride, size_t(t.columns) * 4);
  }
  memset(values, 0, 2 * kWide * sizeof(float));
  const float rate = expf(t.log_rate);
  const Floats skip = broadcast(t.skip);
  for (int64_t row = 0; row < t.rows; ++row) {
    const float *q = t.q + row * t.x_stride, *k = t.k + row * t.x_stride;
    memcpy(values, t.v + row * t.x_stride, size_t(t.columns) * 4);
    const float step = softplus(t.decay[row * t.decay_stride]);
    const Floats keep = broadcast(expf(-rate * step)), share = broadcast(step);
    const Floats written[2] = {mul(share, load(values)), mul(share, load(values + 16))};
    // In two sums for each column: rows of even and of odd index.
    Floats said[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < t.key_dim; ++i) {
      float* line = s + int64_t{i} * kWide;
      const Floats key = broadcast(k[i]), query = broadcast(q[i]);
      Floats* sum = said + i % 2 * 2;
      for (int j = 0; j < 2; ++j) {
        const Floats next = fma(key, written[j], mul(keep, load(line + 16 * j)));
        store(line + 16 * j, next);
        sum[j] = fma(next, query, sum[j]);
      }
    }
    for (int j = 0; j < 2; ++j) store(out + 16 * j, fma(skip, load(values + 16 * j), add(said[j], said[2 + j])));
    memcpy(t.out + row * t.out_stride, out, size_t(t.columns) * 4);
  }
  for (int i = 0; i < t.key_dim; ++i) memcpy(t.after + i * t.state_stride, s + int64_t{i} * kWide, size_t(t.columns) * 4);
}

}  // namespace
