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

struct RecurrenceArgs {
  RowsView q, k, v, decay, write, out;
  int heads, key_dim, value_dim;
};
// One head of one sequence. scratch: 2 key_dim + value_dim floats.
void gated_delta(const RecurrenceArgs& args, const StateView& state, const SequenceRows& rows, int head, float* scratch);

// Features [first, last) of one sequence. weight: (width, features).
void short_convolution(const RowsView& x, const RowsView& out, const float* weight, int width, std::int64_t features,
                       const StateView& state, const SequenceRows& rows, std::int64_t first, std::int64_t last);

}  // namespace kbit
