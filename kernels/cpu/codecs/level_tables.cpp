#include "codecs/level_tables.h"

#include <cstring>

namespace kbit {
namespace {

// Eight codes lie in `Bits` bytes, which one 64-bit number holds; this moves each of them into a byte of its own: halves
// apart, then quarters, then single codes.
template <unsigned Bits>
std::uint64_t apart(std::uint64_t run) {
  constexpr std::uint64_t half = (std::uint64_t{1} << (4 * Bits)) - 1;
  constexpr std::uint64_t pair = ((std::uint64_t{1} << (2 * Bits)) - 1) * 0x0000000100000001u;
  constexpr std::uint64_t code = ((std::uint64_t{1} << Bits) - 1) * 0x0001000100010001u;
  run = (run & half) | ((run & (half << (4 * Bits))) << (32 - 4 * Bits));
  run = (run & pair) | ((run & (pair << (2 * Bits))) << (16 - 2 * Bits));
  return (run & code) | ((run & (code << Bits)) << (8 - Bits));
}

template <unsigned Bits>
void unpack_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes, std::size_t columns,
                 std::uint8_t* codes) {
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* in = data + row * row_bytes;
    std::uint8_t* out = codes + row * columns;
    for (std::size_t first = 0; first < columns; first += 8) {
      const std::size_t at = first / 8 * Bits;
      std::uint64_t run = 0;
      std::memcpy(&run, in + at, row_bytes - at < Bits ? row_bytes - at : Bits);
      run = apart<Bits>(run);
      std::memcpy(out + first, &run, columns - first < 8 ? columns - first : 8);
    }
  }
}

}  // namespace

void unpack_stream(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes, unsigned bits,
                   std::size_t columns, std::uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_rows<1>(data, rows, row_bytes, columns, codes);
    case 2: return unpack_rows<2>(data, rows, row_bytes, columns, codes);
    case 3: return unpack_rows<3>(data, rows, row_bytes, columns, codes);
    case 4: return unpack_rows<4>(data, rows, row_bytes, columns, codes);
    case 5: return unpack_rows<5>(data, rows, row_bytes, columns, codes);
    case 6: return unpack_rows<6>(data, rows, row_bytes, columns, codes);
    case 7: return unpack_rows<7>(data, rows, row_bytes, columns, codes);
    default: return unpack_rows<8>(data, rows, row_bytes, columns, codes);
  }
}

template <typename Value>
void look_up_levels(const std::uint8_t* codes, std::size_t rows, std::size_t columns, const Value* levels,
                    std::size_t blocks, std::size_t size, const std::int32_t* block_of, Value* out) {
  const std::size_t block = columns / blocks;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* in = codes + row * columns;
    Value* to = out + row * columns;
    const Value* tables = levels + row * blocks * size;
    if (block_of != nullptr) {
      for (std::size_t c = 0; c < columns; ++c) to[c] = tables[static_cast<std::size_t>(block_of[c]) * size + in[c]];
      continue;
    }
    for (std::size_t b = 0; b < blocks; ++b) {
      const Value* table = tables + b * size;
      for (std::size_t c = b * block; c < (b + 1) * block; ++c) to[c] = table[in[c]];
    }
  }
}

template void look_up_levels(const std::uint8_t*, std::size_t, std::size_t, const std::uint16_t*, std::size_t,
                             std::size_t, const std::int32_t*, std::uint16_t*);
template void look_up_levels(const std::uint8_t*, std::size_t, std::size_t, const float*, std::size_t, std::size_t,
                             const std::int32_t*, float*);

}  // namespace kbit
