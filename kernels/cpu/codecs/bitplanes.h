// Bit planes: how kbit stores codes of k bits in exactly k bits.
//
// A code of k bits is cut into planes whose widths are powers of two (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1; 2, 4 and
// 8 are one plane). The widest plane holds the lowest bits. Within a plane, consecutive codes of a row fill a byte
// from its least significant bit:
//
//   k = 3, codes c0 c1 c2 ... of one row (c = high bit h, low bits l):
//   plane of width 2:  byte 0 = l3 l2 l1 l0 (two bits each)      byte 1 = l7 l6 l5 l4   ...
//   plane of width 1:  byte 0 = h7 h6 h5 h4 h3 h2 h1 h0          ...
//
// Every row starts on a byte, so a row of K codes takes ceil(K * width / 8) bytes in each plane; bits past the row's
// end are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kbit {

// Bytes one row of `columns` codes takes in a plane of `width` bits.
constexpr std::size_t plane_row_bytes(std::size_t columns, unsigned width) { return (columns * width + 7) / 8; }

// Cuts bits [shift, shift + width) out of every code of a (rows, columns) matrix into one plane.
// width is 1, 2, 4 or 8. plane has rows * plane_row_bytes(columns, width) bytes, all of which are written.
void pack_plane(const std::uint8_t* codes, std::size_t rows, std::size_t columns, unsigned width, unsigned shift,
                std::uint8_t* plane);

// The reverse: ORs (first = false) or writes (first = true) the plane's bits into the codes at `shift`.
void unpack_plane(const std::uint8_t* plane, std::size_t rows, std::size_t columns, unsigned width, unsigned shift,
                  bool first, std::uint8_t* codes);

}  // namespace kbit
