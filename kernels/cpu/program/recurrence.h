// Recurrent layers: states of fixed size, which a pass reads in one slot and leaves in another. kernels/reference_recurrent.py
// says what they mean. Tokens of a sequence are taken one after another, whatever the pass they are in, and every number
// is a sum in one order: so a text's results are the same bits in any pieces, in any batch, on any instruction set.
#pragma once

#include <cstdint>

namespace kbit {

// One of the states of a model, in all its slots.
struct StateView {
  float* data;
  std::int64_t size;  // floats of a slot
};

// Rows [begin, end) of one sequence, and its slots: before is -1 where it begins.
struct SequenceRows {
  std::int64_t begin, end;
  std::int32_t before, after;
};

// Rows of activations: floats from one to the next.
struct RowsView {
  float* data;
  std::int64_t stride;
  float* at(std::int64_t row) const { return data + row * stride; }
};

// Columns of a head's state that are taken together: with the 128 rows of published models they stay in the nearest cache.
constexpr int kRecurred = 32;

// Some columns of one head's state, over the rows of one sequence: Kernels::gated_delta and state_space. Rows that are `stride` floats
// apart begin at the pointers.
struct RecurrenceTask {
  const float *q, *k, *v;        // (key_dim), (key_dim), (columns) of a row
  const float *decay, *write;    // one number of a row
  float* out;                    // (columns) of a row
  std::int64_t x_stride, decay_stride, write_stride, out_stride;  // q, k and v are parts of the same rows
  std::int64_t rows;
  int key_dim, columns;          // columns: at most kRecurred
  float log_rate;
  float skip;                    // state_space: of values, past the state
  const float* before;           // (key_dim, columns), state_stride floats from row to row; null: zeros
  float* after;
  std::int64_t state_stride;
  float* scratch;                // recurrence_scratch(key_dim) floats
};
constexpr std::int64_t recurrence_scratch(std::int64_t key_dim) { return key_dim * (kRecurred + 3) + 2 * kRecurred; }

// Features [first, last) of one sequence. weight: (width, features).
void short_convolution(const RowsView& x, const RowsView& out, const float* weight, const float* bias, int width,
                       std::int64_t features,
                       const StateView& state, const SequenceRows& rows, std::int64_t first, std::int64_t last);

}  // namespace kbit
