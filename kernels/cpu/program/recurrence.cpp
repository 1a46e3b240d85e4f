#include "program/recurrence.h"

#include <algorithm>

namespace kbit {

void short_convolution(const RowsView& x, const RowsView& out, const float* weight, const float* bias, int width,
                       std::int64_t features,
                       const StateView& state, const SequenceRows& rows, std::int64_t first, std::int64_t last) {
  const int before = width - 1;
  const float* old = rows.before < 0 ? nullptr : state.data + rows.before * state.size;
  // The inputs of a row, or of one before the sequence's first of this pass; null where there was none.
  const auto inputs = [&](std::int64_t row) -> const float* {
    if (row >= rows.begin) return x.at(row);
    return old ? old + (before - (rows.begin - row)) * features : nullptr;
  };
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    float* to = out.at(row);
    if (bias) {
      std::copy(bias + first, bias + last, to + first);
    } else {
      std::fill(to + first, to + last, 0.0f);
    }
    for (int i = 0; i < width; ++i) {
      const float *from = inputs(row - before + i), *w = weight + i * features;
      for (std::int64_t c = first; from && c < last; ++c) to[c] += w[c] * from[c];
    }
  }
  // The oldest first: what lies before this pass is read from slots that are written later, or are others.
  float* next = state.data + rows.after * state.size;
  for (int i = 0; i < before; ++i) {
    const float* from = inputs(rows.end - before + i);
    for (std::int64_t c = first; c < last; ++c) next[i * features + c] = from ? from[c] : 0.0f;
  }
}

}  // namespace kbit
