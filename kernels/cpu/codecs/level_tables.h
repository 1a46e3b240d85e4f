// What other quantizers' codes stand for, by a table of each block: unpacking streams of codes, and looking them up.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kbit {

// Codes of `bits` bits (1 to 8) of rows that are streams of them, the first in the lowest bits of the first byte.
// A row has row_bytes bytes, at least ceil(columns * bits / 8).
void unpack_stream(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes, unsigned bits,
                   std::size_t columns, std::uint8_t* codes);

// out[r, c] = levels[r, block of c, codes[r, c]] for a (rows, columns) matrix.
//
// levels is (rows, blocks, size); the block of a column is block_of[c], or c / (columns / blocks) where block_of is null.
// Codes are below size, and block_of below blocks: the caller has seen to it.
template <typename Value>
void look_up_levels(const std::uint8_t* codes, std::size_t rows, std::size_t columns, const Value* levels,
                    std::size_t blocks, std::size_t size, const std::int32_t* block_of, Value* out);

}  // namespace kbit
