#include "attention/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace kbit {
namespace {

// Zeroed memory that costs nothing until it is touched.
std::uint8_t* allocate(std::int64_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
  void* memory =
      mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::uint8_t*>(memory);
#else
  void* memory = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64));
  std::memset(memory, 0, static_cast<std::size_t>(bytes));
  return static_cast<std::uint8_t*>(memory);
#endif
}

void release(std::uint8_t* memory, std::int64_t bytes) {
  if (memory == nullptr) return;
#if defined(__unix__) || defined(__APPLE__)
  munmap(memory, static_cast<std::size_t>(bytes));
#else
  (void)bytes;
  ::operator delete(memory, std::align_val_t(64));
#endif
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int bits_of(const std::string& kind) {
  if (kind == "fp32") return 32;
  if (kind == "fp16") return 16;
  if (kind == "8" || kind == "4" || kind == "3" || kind == "2") return kind[0] - '0';
  throw std::invalid_argument("a KV cache is fp32, fp16, or of 8, 4, 3 or 2 bits, not '" + kind + "'");
}

// Everything of a view that does not depend on the number of rows and slots.
CacheView describe(int bits, std::int64_t head_dim, std::int64_t kv_heads) {
  CacheView v{};
  v.bits = bits;
  v.head_dim = static_cast<int>(head_dim);
  v.padded = static_cast<int>(round_up(head_dim, 16));
  v.kv_heads = static_cast<int>(kv_heads);
  if (bits >= 16) {
    v.group = v.padded;
    v.groups = 1;
    v.key_codes = v.key_block = round_up(kSlots * head_dim * bits / 8, 64);
    v.value_codes = v.value_block = kSlots * v.padded * bits / 8;
    return v;
  }
  if (head_dim % 16 != 0) {
    throw std::invalid_argument("a KV cache of codes needs heads of a multiple of 16 features, not " +
                                std::to_string(head_dim) + "; use fp16");
  }
  v.group = head_dim % 32 == 0 ? 32 : 16;
  v.groups = v.head_dim / v.group;
  const std::int64_t scales = round_up(v.groups * kSlots * 2, 64);
  for (const int width : {8, 4, 2, 1}) {
    if (bits == width || (bits == 3 && width <= 2)) v.key_codes += round_up(head_dim * 2 * width, 64);
  }
  v.value_codes = round_up(head_dim * 2 * bits, 64);
  v.key_block = v.key_codes + scales;
  v.value_block = v.value_codes + scales;
  return v;
}

float from_half(std::uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

template <typename T>
T read(const std::uint8_t* p, std::int64_t index) {
  T value;
  std::memcpy(&value, p + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

int key_field(const std::uint8_t* plane, int width, int slot, int feature) {
  const int quad = feature / 4, per_byte = 8 / width;
  const int byte = plane[quad / per_byte * 64 + 4 * slot + feature % 4];
  return byte >> (quad % per_byte * width) & ((1 << width) - 1);
}

int value_field(const std::uint8_t* plane, int width, int slot, int feature) {
  plane += static_cast<std::int64_t>(feature / 16) * 32 * width;
  if (width == 1) return read<std::uint16_t>(plane, feature % 16) >> slot & 1;
  const int bit = slot * width;
  return static_cast<int>(read<std::uint32_t>(plane + bit / 32 * 64, feature % 16) >> (bit % 32)) & ((1 << width) - 1);
}

// One slot's head as floats, still rotated where codes are.
void read_slot(const CacheView& v, const std::uint8_t* block, bool keys, int slot, float* out) {
  const auto field = keys ? key_field : value_field;
  const std::uint8_t* scales = block + (keys ? v.key_codes : v.value_codes);
  const std::int64_t top_plane = keys ? round_up(v.head_dim * 4, 64) : v.head_dim * 4;
  for (int d = 0; d < v.head_dim; ++d) {
    const std::int64_t index = keys ? d * kSlots + slot : static_cast<std::int64_t>(slot) * v.padded + d;
    if (v.bits == 32) {
      out[d] = read<float>(block, index);
    } else if (v.bits == 16) {
      out[d] = from_half(read<std::uint16_t>(block, index));
    } else {
      int level;
      if (v.bits == 8) {
        level = field(block, 8, slot, d);
        level = keys ? static_cast<std::int8_t>(level) : level - 128;
      } else {
        const int code = v.bits == 3 ? field(block, 2, slot, d) | field(block + top_plane, 1, slot, d) << 2
                                     : field(block, v.bits, slot, d);
        level = 2 * code + 1 - (1 << v.bits);
      }
      out[d] = static_cast<float>(level) * from_half(read<std::uint16_t>(scales, d / v.group * kSlots + slot));
    }
  }
}

void unrotate(const CacheView& v, float* x) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(v.group));
  for (float* end = x + v.head_dim; x < end; x += v.group) {
    for (int h = 1; h < v.group; h *= 2) {
      for (int i = 0; i < v.group; ++i) {
        if (i & h) continue;
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    }
    for (int i = 0; i < v.group; ++i) x[i] *= norm;
  }
}

}  // namespace

KVCache::KVCache(std::int64_t layers, std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim,
                 std::int64_t capacity, const std::string& kind)
    : kind_(kind), layers_(layers), capacity_(0) {
  if (batch < 1 || capacity < 1) {
    throw std::invalid_argument("a cache needs at least 1 row and 1 token per row, not " + std::to_string(batch) +
                                " and " + std::to_string(capacity));
  }
  if (layers < 1 || kv_heads < 1 || head_dim < 1) {
    throw std::invalid_argument("a cache needs at least 1 layer, head and feature");
  }
  view_ = describe(bits_of(kind), head_dim, kv_heads);
  lengths_.assign(static_cast<std::size_t>(batch), 0);
  std::vector<std::int64_t> rows(lengths_.size(), -1);
  rebuild(rows, capacity);
}

KVCache::~KVCache() { release(view_.data, bytes_); }

void KVCache::rebuild(const std::vector<std::int64_t>& rows, std::int64_t capacity) {
  CacheView next = view_;
  next.rows = static_cast<std::int64_t>(rows.size());
  if (capacity > (std::int64_t{1} << 31) - kChunk) {
    throw std::invalid_argument("a cache holds fewer than 2^31 tokens per row, not " + std::to_string(capacity));
  }
  next.slots = round_up(capacity, kSlots);
  next.strip = next.slots / kSlots * (next.key_block + next.value_block);
  const double strips = static_cast<double>(layers_) * static_cast<double>(next.rows) * next.kv_heads;
  if (strips * static_cast<double>(next.strip) > 1e18) throw std::bad_alloc();
  const std::int64_t next_bytes = layers_ * next.rows * next.kv_heads * next.strip;
  next.data = allocate(next_bytes);
  std::vector<std::int64_t> lengths(rows.size(), 0);
  for (std::int64_t i = 0; i < next.rows; ++i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    if (row < 0) continue;
    const std::int64_t length = lengths_[static_cast<std::size_t>(row)];
    const std::int64_t blocks = round_up(length, kSlots) / kSlots;
    lengths[static_cast<std::size_t>(i)] = length;
    for (std::int64_t layer = 0; layer < layers_; ++layer) {
      for (std::int64_t head = 0; head < next.kv_heads; ++head) {
        std::memcpy(keys_of(next, layer, i, head), keys_of(view_, layer, row, head),
                    static_cast<std::size_t>(blocks * next.key_block));
        std::memcpy(values_of(next, layer, i, head), values_of(view_, layer, row, head),
                    static_cast<std::size_t>(blocks * next.value_block));
      }
    }
  }
  release(view_.data, bytes_);
  view_ = next;
  bytes_ = next_bytes;
  capacity_ = capacity;
  lengths_ = std::move(lengths);
}

void KVCache::check_rows(const std::vector<std::int64_t>& values, const char* what) const {
  if (values.size() != lengths_.size()) {
    throw std::invalid_argument(std::string(what) + " takes one number per row of the cache: " +
                                std::to_string(lengths_.size()) + ", not " + std::to_string(values.size()));
  }
  for (const std::int64_t value : values) {
    if (value < 0) {
      throw std::invalid_argument(std::string("cannot ") + what + " a cache by or to a negative number (" +
                                  std::to_string(value) + ")");
    }
  }
}

void KVCache::reserve(const std::vector<std::int64_t>& more) const {
  check_rows(more, "reserve");
  for (std::size_t row = 0; row < more.size(); ++row) {
    if (more[row] > capacity_ - lengths_[row]) {
      throw std::invalid_argument("the KV cache holds " + std::to_string(capacity_) + " tokens per row: row " +
                                  std::to_string(row) + " has " + std::to_string(lengths_[row]) + " and " +
                                  std::to_string(more[row]) +
                                  " more do not fit; make the cache larger or the text shorter");
    }
  }
}

void KVCache::advance(const std::vector<std::int64_t>& more) {
  reserve(more);
  for (std::size_t row = 0; row < more.size(); ++row) lengths_[row] += more[row];
}

void KVCache::truncate(const std::vector<std::int64_t>& lengths) {
  check_rows(lengths, "truncate");
  for (std::size_t row = 0; row < lengths.size(); ++row) lengths_[row] = std::min(lengths_[row], lengths[row]);
}

void KVCache::select(const std::vector<std::int64_t>& rows) {
  bool valid = !rows.empty();
  for (const std::int64_t row : rows) valid = valid && row >= 0 && row < view_.rows;
  if (!valid) {
    throw std::invalid_argument("these rows do not select from a cache of " + std::to_string(view_.rows) + " rows");
  }
  bool same = rows.size() == lengths_.size();
  for (std::size_t i = 0; same && i < rows.size(); ++i) same = rows[i] == static_cast<std::int64_t>(i);
  if (!same) rebuild(rows, capacity_);
}

void KVCache::grow(std::int64_t capacity) {
  if (capacity <= capacity_) return;
  if (capacity <= view_.slots) {
    capacity_ = capacity;
    return;
  }
  std::vector<std::int64_t> rows(lengths_.size());
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int64_t>(i);
  rebuild(rows, capacity);
}

void KVCache::dequantize(std::int64_t layer, std::int64_t row, float* keys, float* values) const {
  const std::int64_t length = lengths_[static_cast<std::size_t>(row)];
  for (std::int64_t head = 0; head < view_.kv_heads; ++head) {
    for (std::int64_t slot = 0; slot < length; ++slot) {
      const std::int64_t block = slot / kSlots;
      const int within = static_cast<int>(slot % kSlots);
      read_slot(view_, keys_of(view_, layer, row, head) + block * view_.key_block, true, within, keys);
      read_slot(view_, values_of(view_, layer, row, head) + block * view_.value_block, false, within, values);
      if (view_.bits < 16) {
        unrotate(view_, keys);
        unrotate(view_, values);
      }
      keys += view_.head_dim;
      values += view_.head_dim;
    }
  }
}

}  // namespace kbit
