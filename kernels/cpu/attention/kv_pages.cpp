#include "attention/kv_pages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

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

// Bits of keys and of values.
std::pair<int, int> bits_of(const std::string& kind) {
  if (kind == "fp32") return {32, 32};
  if (kind == "fp16") return {16, 16};
  const auto width = [](char digit) { return std::string("8432").find(digit) != std::string::npos; };
  if (kind.size() == 1 && width(kind[0])) return {kind[0] - '0', kind[0] - '0'};
  if (kind.size() == 3 && width(kind[0]) && kind[1] == ',' && width(kind[2])) return {kind[0] - '0', kind[2] - '0'};
  throw std::invalid_argument("a KV cache is fp32, fp16, or of 8, 4, 3 or 2 bits, not '" + kind + "'");
}

// Bytes of the codes of one block of keys.
std::int64_t key_code_bytes(std::int64_t head_dim, int bits) {
  std::int64_t bytes = 0;
  for (const int width : {8, 4, 2, 1}) {
    if (bits == width || (bits == 3 && width <= 2)) bytes += round_up(head_dim * 2 * width, 64);
  }
  return bytes;
}

// Everything of a view but the pages themselves.
CacheView describe(const std::string& kind, const KVHeads& heads) {
  const auto [key_bits, value_bits] = bits_of(kind);
  const std::int64_t head_dim = heads.dim, kv_heads = heads.count;
  if (heads.latent && key_bits != value_bits) {
    throw std::invalid_argument("a cache whose keys are its values has one width, not '" + kind + "'");
  }
  if (kv_heads < 1 || head_dim < 1) throw std::invalid_argument("a cache needs at least 1 layer, head and feature");
  CacheView v{};
  v.key_bits = key_bits;
  v.value_bits = value_bits;
  v.head_dim = static_cast<int>(head_dim);
  v.padded = static_cast<int>(round_up(head_dim, 16));
  v.kv_heads = static_cast<int>(kv_heads);
  v.latent = heads.latent;
  if (key_bits >= 16) {
    v.group = v.padded;
    v.groups = 1;
    v.key_codes = v.key_block = round_up(kSlots * head_dim * key_bits / 8, 64);
    v.value_codes = v.value_block = heads.latent ? 0 : kSlots * v.padded * value_bits / 8;
    v.strip = kPageBlocks * (v.key_block + v.value_block);
    return v;
  }
  if (head_dim % 16 != 0) {
    throw std::invalid_argument("a KV cache of codes needs heads of a multiple of 16 features, not " +
                                std::to_string(head_dim) + "; use fp16");
  }
  v.group = head_dim % 32 == 0 ? 32 : 16;
  v.groups = v.head_dim / v.group;
  const std::int64_t scales = round_up(v.groups * kSlots * 2, 64);
  v.key_codes = key_code_bytes(head_dim, key_bits);
  v.value_codes = round_up(head_dim * 2 * value_bits, 64);
  v.key_block = v.key_codes + scales;
  v.value_block = v.value_codes + scales;
  if (heads.latent) v.value_codes = v.value_block = 0;
  v.strip = kPageBlocks * (v.key_block + v.value_block);
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
  const int bits = keys ? v.key_bits : v.value_bits;
  const std::uint8_t* scales = block + (keys ? v.key_codes : v.value_codes);
  const std::int64_t top_plane = keys ? round_up(v.head_dim * 4, 64) : v.head_dim * 4;
  for (int d = 0; d < v.head_dim; ++d) {
    const std::int64_t index = keys ? d * kSlots + slot : static_cast<std::int64_t>(slot) * v.padded + d;
    if (bits == 32) {
      out[d] = read<float>(block, index);
    } else if (bits == 16) {
      out[d] = from_half(read<std::uint16_t>(block, index));
    } else {
      int level;
      if (bits == 8) {
        level = field(block, 8, slot, d);
        level = keys ? static_cast<std::int8_t>(level) : level - 128;
      } else {
        const int code = bits == 3 ? field(block, 2, slot, d) | field(block + top_plane, 1, slot, d) << 2
                                     : field(block, bits, slot, d);
        level = bits == 4 ? kKeptLevels[code] : 2 * code + 1 - (1 << bits);
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

std::int64_t KVPages::page_bytes(const std::vector<KVHeads>& layers, const std::string& kind) {
  if (layers.empty()) throw std::invalid_argument("a cache needs at least 1 layer, head and feature");
  double total = 0;
  std::int64_t bytes = 0;
  for (const KVHeads& heads : layers) {
    const CacheView view = describe(kind, heads);
    total += static_cast<double>(heads.count) * static_cast<double>(view.strip);
    if (total > 1e18) throw std::bad_alloc();
    bytes += heads.count * view.strip;
  }
  return bytes;
}

KVPages::KVPages(const std::vector<KVHeads>& layers, const std::string& kind, std::int64_t count)
    : kind_(kind), page_bytes_(page_bytes(layers, kind)) {
  if (count < 1) throw std::invalid_argument("a cache needs at least 1 page, not " + std::to_string(count));
  std::int64_t offset = 0;
  for (const KVHeads& heads : layers) {
    views_.push_back(describe(kind, heads));
    views_.back().offset = offset;
    offset += heads.count * views_.back().strip;
  }
  resize(count);
}

KVPages::~KVPages() {
  for (const Arena& arena : arenas_) release(arena.data, arena.bytes);
}

void KVPages::resize(std::int64_t count) {
  const std::int64_t more = count - this->count();
  if (more <= 0) return;
  if (count > std::numeric_limits<std::int32_t>::max() ||
      static_cast<double>(more) * static_cast<double>(page_bytes_) > 1e18) {
    throw std::bad_alloc();
  }
  arenas_.reserve(arenas_.size() + 1);
  pages_.reserve(static_cast<std::size_t>(count));
  for (CacheView& view : views_) view.pages = pages_.data();
  const Arena arena{allocate(more * page_bytes_), more * page_bytes_};
  arenas_.push_back(arena);
  for (std::int64_t i = 0; i < more; ++i) pages_.push_back(arena.data + i * page_bytes_);
}

void KVPages::copy(std::int64_t source, std::int64_t target) {
  std::memmove(page(target), page(source), static_cast<std::size_t>(page_bytes_));
}

std::uint8_t* KVPages::page(std::int64_t id) const {
  if (id < 0 || id >= count()) throw std::invalid_argument("the cache has no such page");
  return pages_[static_cast<std::size_t>(id)];
}

void KVPages::dequantize(std::int64_t layer, const std::int32_t* table, std::int64_t length, float* keys,
                         float* values) const {
  const CacheView& c = view(layer);
  for (std::int64_t head = 0; head < c.kv_heads; ++head) {
    for (std::int64_t slot = 0; slot < length; ++slot) {
      std::uint8_t* strip = keys_of(c, table[slot / kPage], head);
      const std::int64_t block = slot % kPage / kSlots;
      const int within = static_cast<int>(slot % kSlots);
      read_slot(c, strip + block * c.key_block, true, within, keys);
      if (!c.latent) read_slot(c, values_of(c, strip) + block * c.value_block, false, within, values);
      if (c.key_bits < 16) {
        unrotate(c, keys);
        if (!c.latent) unrotate(c, values);
      }
      if (c.latent) std::copy(keys, keys + c.head_dim, values);
      keys += c.head_dim;
      values += c.head_dim;
    }
  }
}

}  // namespace kbit
