#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "rounding/rounding.h"

namespace kbit {

Grid::Grid(std::vector<float> levels_, std::vector<std::uint8_t> codes_)
    : levels(std::move(levels_)), codes(std::move(codes_)) {
  if (levels.empty() || levels.size() > 256 || levels.size() != codes.size()) {
    throw std::invalid_argument("a grid has 1 to 256 levels, and a code for each");
  }
  for (std::size_t i = 1; i < levels.size(); ++i) {
    if (!(levels[i - 1] < levels[i])) throw std::invalid_argument("levels must ascend");
    borders.push_back((levels[i] + levels[i - 1]) / 2);
  }
  // Four cells a level: a search then looks at one or two borders. The same arithmetic as the search's places the
  // borders, so none can be missed: the cell of a value never falls as the value rises.
  const std::size_t cells = std::max<std::size_t>(64, 4 * levels.size());
  std::vector<int> in_cell(cells, 0);
  const float half = float(cells) / 2;
  const auto cell_of = [&](float border) {
    const float place = border * half + half;
    return place >= float(cells) ? cells - 1 : place > 0 ? std::size_t(place) : std::size_t{0};
  };
  for (const float border : borders) most_in_cell = std::max(most_in_cell, ++in_cell[cell_of(border)]);
  starts.assign(cells, 0);
  std::size_t below = 0;
  for (std::size_t cell = 0; cell < cells; ++cell) {
    while (below < borders.size() && cell_of(borders[below]) < cell) ++below;
    starts[cell] = std::uint8_t(below);
  }
  levels.resize(256, 0.0f);
  borders.resize(256, std::numeric_limits<float>::max());
}

}  // namespace kbit
