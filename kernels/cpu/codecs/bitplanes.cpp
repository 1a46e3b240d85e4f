#include "codecs/bitplanes.h"

namespace kbit {
namespace {

// One specialisation per width: the inner loop over the codes of a byte then has a constant trip count and constant
// shifts, which is what lets the compiler vectorise it (see benchmarks/test_formats.py for what it reaches).
template <unsigned Width>
void pack_rows(const std::uint8_t* codes, std::size_t rows, std::size_t columns, unsigned shift, std::uint8_t* plane) {
  constexpr unsigned per_byte = 8 / Width;
  constexpr std::uint8_t mask = static_cast<std::uint8_t>((1u << Width) - 1);
  const std::size_t row_bytes = plane_row_bytes(columns, Width);
  const std::size_t whole = columns / per_byte;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* in = codes + row * columns;
    std::uint8_t* out = plane + row * row_bytes;
    for (std::size_t byte = 0; byte < whole; ++byte) {
      unsigned value = 0;
      for (unsigned i = 0; i < per_byte; ++i) {
        value |= static_cast<unsigned>((in[byte * per_byte + i] >> shift) & mask) << (i * Width);
      }
      out[byte] = static_cast<std::uint8_t>(value);
    }
    if (whole < row_bytes) {  // the row's last, partly filled byte
      unsigned value = 0;
      for (std::size_t i = whole * per_byte; i < columns; ++i) {
        value |= static_cast<unsigned>((in[i] >> shift) & mask) << ((i - whole * per_byte) * Width);
      }
      out[whole] = static_cast<std::uint8_t>(value);
    }
  }
}

template <unsigned Width, bool First>
void unpack_rows(const std::uint8_t* plane, std::size_t rows, std::size_t columns, unsigned shift,
                 std::uint8_t* codes) {
  constexpr unsigned per_byte = 8 / Width;
  constexpr std::uint8_t mask = static_cast<std::uint8_t>((1u << Width) - 1);
  const std::size_t row_bytes = plane_row_bytes(columns, Width);
  const std::size_t whole = columns / per_byte;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* in = plane + row * row_bytes;
    std::uint8_t* out = codes + row * columns;
    for (std::size_t byte = 0; byte < whole; ++byte) {
      const unsigned value = in[byte];
      for (unsigned i = 0; i < per_byte; ++i) {
        const std::uint8_t bits = static_cast<std::uint8_t>(((value >> (i * Width)) & mask) << shift);
        out[byte * per_byte + i] = First ? bits : static_cast<std::uint8_t>(out[byte * per_byte + i] | bits);
      }
    }
    for (std::size_t i = whole * per_byte; i < columns; ++i) {  // the row's last, partly filled byte
      const std::uint8_t bits =
          static_cast<std::uint8_t>(((in[whole] >> ((i - whole * per_byte) * Width)) & mask) << shift);
      out[i] = First ? bits : static_cast<std::uint8_t>(out[i] | bits);
    }
  }
}

template <bool First>
void unpack_any(const std::uint8_t* plane, std::size_t rows, std::size_t columns, unsigned width, unsigned shift,
                std::uint8_t* codes) {
  switch (width) {
    case 1: return unpack_rows<1, First>(plane, rows, columns, shift, codes);
    case 2: return unpack_rows<2, First>(plane, rows, columns, shift, codes);
    case 4: return unpack_rows<4, First>(plane, rows, columns, shift, codes);
    default: return unpack_rows<8, First>(plane, rows, columns, shift, codes);
  }
}

}  // namespace

void pack_plane(const std::uint8_t* codes, std::size_t rows, std::size_t columns, unsigned width, unsigned shift,
                std::uint8_t* plane) {
  switch (width) {
    case 1: return pack_rows<1>(codes, rows, columns, shift, plane);
    case 2: return pack_rows<2>(codes, rows, columns, shift, plane);
    case 4: return pack_rows<4>(codes, rows, columns, shift, plane);
    default: return pack_rows<8>(codes, rows, columns, shift, plane);
  }
}

void unpack_plane(const std::uint8_t* plane, std::size_t rows, std::size_t columns, unsigned width, unsigned shift,
                  bool first, std::uint8_t* codes) {
  if (first) {
    unpack_any<true>(plane, rows, columns, width, shift, codes);
  } else {
    unpack_any<false>(plane, rows, columns, width, shift, codes);
  }
}

}  // namespace kbit
