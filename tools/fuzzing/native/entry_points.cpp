// C++ entry points with input that libFuzzer chooses by what it executes. The first byte says which. What their bindings
// refuse (kernels/cpu/bind) is not tried here: tools/fuzzing/native_target.py calls through them.
//
// A finding: what ASan reports; an exception that the header does not name; a result that is wrong in itself, such as a
// token that may not be chosen, or codes that come out of their planes otherwise than they went in.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include "attention/kv_pages.h"
#include "codecs/bitplanes.h"
#include "codecs/level_tables.h"
#include "codecs/mapped_file.h"
#include "codecs/matrix_storage.h"
#include "codecs/scale_steps.h"
#include "isa/isa.h"
#include "program/program.h"
#include "sampling/sampling.h"
#include "text/byte_pairs.h"

namespace {

using namespace kbit;
using Data = FuzzedDataProvider;

void must(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// n numbers of the input's bytes, zeros where it ends: floats may be NaN or infinite.
template <typename T>
std::vector<T> numbers(Data& data, std::size_t n) {
  std::vector<T> out(n);
  data.ConsumeData(out.data(), n * sizeof(T));
  return out;
}

// Of every instruction set that is compiled in and runs here, the plain one first.
const std::vector<std::shared_ptr<Context>>& contexts() {
  static const auto all = [] {
    std::vector<std::shared_ptr<Context>> made;
    for (const std::string& name : instruction_sets()) made.push_back(std::make_shared<Context>(name, 1));
    return made;
  }();
  return all;
}

// Token tables as a hostile file may have them, or as fill_* make them of hostile texts and merges.
void byte_pairs(Data& data) {
  const bool filled = data.ConsumeBool(), whole = data.ConsumeBool();
  const auto words = numbers<std::uint8_t>(data, data.ConsumeIntegralInRange<std::size_t>(1, 12));
  const std::string texts = data.ConsumeRandomLengthString(64);
  auto part = [&] {
    auto bytes = numbers<std::uint8_t>(data, 4 * data.ConsumeIntegralInRange<std::size_t>(0, 24));
    // Small numbers, most of the time: those that lie inside.
    if (data.ConsumeBool()) for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = i % 4 ? 0 : bytes[i] % 16;
    return bytes;
  };
  const auto ends = part(), merges = part();
  auto token_slots = part(), merge_slots = part();
  try {
    if (filled) {
      token_slots.assign(std::bit_ceil(ends.size() / 4 + 1) * 4, 0);
      merge_slots.assign(std::bit_ceil(merges.size() / 12 + 1) * 4, 0);
      fill_token_slots(texts, Numbers(ends), token_slots);
      fill_merge_slots(Numbers(merges), merge_slots);
    }
    BytePairs pairs({texts, Numbers(ends), Numbers(token_slots), Numbers(merges), Numbers(merge_slots)}, whole);
    std::vector<std::uint32_t> word(words.begin(), words.end()), out;
    pairs.encode(word, out);
    must(!out.empty() && out.size() <= word.size(), "merging made more tokens");
    if (const auto found = pairs.find(texts)) must(pairs.text(*found) == texts, "another token was found");
  } catch (const std::runtime_error&) {
  }
}

// Codes through planes, streams, tables and steps.
void codes(Data& data) {
  const auto rows = data.ConsumeIntegralInRange<std::size_t>(0, 5), columns = data.ConsumeIntegralInRange<std::size_t>(0, 40);
  const unsigned width = 1u << data.ConsumeIntegralInRange(0, 3), shift = data.ConsumeIntegralInRange(0u, 8u - width);
  const unsigned bits = data.ConsumeIntegralInRange(1u, 8u);
  const auto given = numbers<std::uint8_t>(data, rows * columns);
  std::vector<std::uint8_t> plane(rows * plane_row_bytes(columns, width)), back(rows * columns), stream_codes(rows * columns);
  pack_plane(given.data(), rows, columns, width, shift, plane.data());
  unpack_plane(plane.data(), rows, columns, width, shift, true, back.data());
  const auto mask = static_cast<std::uint8_t>(((1u << width) - 1) << shift);
  for (std::size_t i = 0; i < given.size(); ++i) must(back[i] == (given[i] & mask), "codes changed in a plane");
  const std::size_t row_bytes = (columns * bits + 7) / 8 + data.ConsumeIntegralInRange<std::size_t>(0, 3);
  const auto stream = numbers<std::uint8_t>(data, rows * row_bytes);
  unpack_stream(stream.data(), rows, row_bytes, bits, columns, stream_codes.data());
  for (const auto code : stream_codes) must(code < 1u << bits, "a code has more bits than the stream");
  const std::size_t blocks = 3, size = std::size_t{1} << bits;
  const auto levels = numbers<float>(data, rows * blocks * size);
  auto of = numbers<std::int32_t>(data, columns);
  for (auto& block : of) block &= 1;
  std::vector<float> out(rows * columns);
  look_up_levels(stream_codes.data(), rows, columns, levels.data(), blocks, size, of.data(), out.data());
  const auto scales = numbers<float>(data, data.ConsumeIntegralInRange<std::size_t>(1, 16));
  std::array<std::int8_t, 16> steps;
  float unit = 0;
  if (find_steps(scales.data(), static_cast<int>(scales.size()), &unit, steps.data())) {
    for (std::size_t i = 0; i < scales.size(); ++i) {
      must(std::bit_cast<std::uint32_t>(static_cast<float>(steps[i]) * unit) == std::bit_cast<std::uint32_t>(scales[i]),
           "steps are other numbers than the scales");
    }
  }
}

// Samplers of the same settings choose the same on every instruction set, and nothing that may not be chosen.
void sampler(Data& data) {
  SamplerSettings s{};
  auto pick = [&](std::vector<double> from) { return data.PickValueInArray({from[0], from[1], from[2]}); };
  s.factor = static_cast<float>(pick({0.0, 1.0, data.ConsumeProbability<double>() * 1e30}));
  s.greedy = s.factor == 0;
  s.top_k = data.ConsumeIntegralInRange<std::int64_t>(0, 400);
  s.top_p = pick({1.0, std::max(1e-300, data.ConsumeProbability<double>()), 1e-9});
  s.min_score = static_cast<float>(pick({-INFINITY, 0.0, -50 * data.ConsumeProbability<double>()}));
  s.typical_p = pick({1.0, std::max(1e-300, data.ConsumeProbability<double>()), 1e-9});
  s.repetition_penalty = static_cast<float>(pick({1.0, 0.0, 2.0}));
  s.presence_penalty = static_cast<float>(pick({0.0, 1e30, -1.0}));
  s.frequency_penalty = static_cast<float>(pick({0.0, -1e38, 0.5}));
  s.seed = data.ConsumeIntegral<std::uint64_t>();
  s.choice = data.ConsumeIntegral<std::uint64_t>();
  for (int i = data.ConsumeIntegralInRange(0, 3); i > 0; --i) {
    s.bias.emplace_back(data.ConsumeIntegralInRange(0, 700), data.ConsumeFloatingPoint<float>());
  }
  const auto seen = numbers<std::int64_t>(data, data.ConsumeIntegralInRange<std::size_t>(0, 4));
  const auto count = data.ConsumeIntegralInRange<std::size_t>(1, 600);
  const auto masked = data.ConsumeIntegralInRange<std::size_t>(0, 600);
  const bool raw = data.ConsumeBool();
  std::vector<float> logits = raw ? numbers<float>(data, count) : std::vector<float>(count);
  if (!raw) for (std::size_t i = 0; i < count; ++i) logits[i] = static_cast<float>(data.ConsumeIntegral<std::int8_t>()) / 4;
  const auto allowed = std::make_unique<bool[]>(masked + 1);
  for (std::size_t i = 0; i < masked; ++i) allowed[i] = data.ConsumeBool();
  const TokenMask mask = masked ? TokenMask{allowed.get(), static_cast<std::int64_t>(masked)} : TokenMask{};
  RowSampler one(s), other(s);
  SamplingScratch scratch, second;
  for (RowSampler* each : {&one, &other}) each->see(seen.data(), static_cast<std::int64_t>(seen.size()));
  const auto width = static_cast<std::int64_t>(count);
  const Kernels& plain = *contexts().front()->kernels;
  const Kernels& some = *contexts()[data.ConsumeIntegralInRange<std::size_t>(0, contexts().size() - 1)]->kernels;
  for (int turn = 0; turn < 3; ++turn) {
    const Chosen a = one.choose(plain, logits.data(), width, mask, scratch);
    const Chosen b = other.choose(some, logits.data(), width, mask, second);
    must(a.token == b.token, "the same settings chose otherwise");
    must(a.token >= -1 && a.token < width, "a token outside of the row");
    if (a.token < 0) break;
    must(std::isfinite(a.best), "a choice although no logit is a number");
    must(!masked || (a.token < static_cast<std::int64_t>(masked) && allowed[a.token]), "a token that may not be chosen");
  }
  const auto top = data.ConsumeIntegralInRange<std::int64_t>(0, width);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(top));
  std::vector<float> values(ids.size());
  float best = 0;
  double total = 0;
  if (score_row(some, logits.data(), width, top, best, total, ids.data(), values.data(), scratch)) {
    must(total >= 1 && total <= static_cast<double>(count), "a sum of weights out of range");
    for (std::size_t i = 0; i < ids.size(); ++i) {
      must(ids[i] >= 0 && ids[i] < width && values[i] == logits[static_cast<std::size_t>(ids[i])], "another logit");
      must(i == 0 || values[i] <= values[i - 1], "the largest are not in order");
    }
  }
}

// A pool of pages that grows, is written to, copied and read.
void kv_pages(Data& data) {
  const std::string kind = data.ConsumeBool() ? data.PickValueInArray({"fp32", "fp16", "8", "4", "3", "2", "8,4", "4,2", "3,8"})
                                              : data.ConsumeRandomLengthString(5);
  std::vector<KVHeads> layers;
  const bool latent = data.ConsumeBool(), extreme = data.ConsumeIntegralInRange(0, 15) == 0;
  for (int i = data.ConsumeIntegralInRange(0, 3); i > 0; --i) {
    const std::int64_t most = extreme ? 1 << 20 : 64;
    layers.push_back({data.ConsumeIntegralInRange<std::int64_t>(-1, extreme ? most : 4),
                      data.ConsumeIntegralInRange<std::int64_t>(-1, most), latent});
  }
  const auto count = data.ConsumeIntegralInRange<std::int64_t>(-1, 6);
  try {
    const std::int64_t bytes = KVPages::page_bytes(layers, kind);
    must(bytes > 0, "a page without bytes");
    if (bytes > 1 << 20) return;
    KVPages pages(layers, kind, count);
    pages.resize(data.ConsumeIntegralInRange<std::int64_t>(-1, 12));
    for (int i = 0; i < 4; ++i) {
      const auto source = data.ConsumeIntegral<std::int8_t>(), target = data.ConsumeIntegral<std::int8_t>();
      try {
        pages.copy(source, target);
        must(source >= 0 && target >= 0 && source < pages.count() && target < pages.count(), "a page that is not there");
      } catch (const std::invalid_argument&) {
      }
    }
    const auto layer = data.ConsumeIntegralInRange<std::int64_t>(0, pages.layers() - 1);
    const CacheView& view = pages.view(layer);
    std::vector<std::int32_t> table{static_cast<std::int32_t>(data.ConsumeIntegralInRange<std::int64_t>(0, pages.count() - 1)),
                                    static_cast<std::int32_t>(data.ConsumeIntegralInRange<std::int64_t>(0, pages.count() - 1))};
    const auto length = data.ConsumeIntegralInRange<std::int64_t>(0, 2 * kPage);
    const auto contents = data.ConsumeRemainingBytes<std::uint8_t>();
    std::uint8_t* page = keys_of(view, table[0], 0);
    const auto room = static_cast<std::size_t>(view.kv_heads * view.strip);
    std::memcpy(page, contents.data(), std::min(room, contents.size()));
    const auto size = static_cast<std::size_t>(view.kv_heads * length * view.head_dim);
    std::vector<float> keys(size), values(size);
    pages.dequantize(layer, table.data(), length, keys.data(), values.data());
  } catch (const std::invalid_argument&) {
  } catch (const std::bad_alloc&) {
    must(extreme, "memory for a small cache is refused");
  }
}

// A file of arrays, as another process may have left it, mapped as what a hostile index says.
Weights mapped_again(Data& data, const MatrixStorage& prepared) {
  static const std::string path = "/dev/shm/kbit-fuzz-" + std::to_string(::getpid());
  Description what = prepared.description();
  std::array<std::uint64_t, kArrays> begins{};
  std::string file;
  const auto arrays = prepared.arrays();
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    begins[i] = file.size();
    if (arrays[i].begin) file.append(reinterpret_cast<const char*>(arrays[i].begin), arrays[i].size);
    file.resize((file.size() + 63) / 64 * 64);
  }
  const bool honest = data.ConsumeBool();
  if (!honest) {
    if (data.ConsumeBool()) begins[data.ConsumeIntegralInRange<std::size_t>(0, kArrays - 1)] = data.ConsumeIntegral<std::uint64_t>();
    if (data.ConsumeBool()) file.resize(data.ConsumeIntegralInRange<std::size_t>(1, file.size()));
    if (data.ConsumeBool()) what.rows += data.ConsumeIntegralInRange(0, 64);
    if (data.ConsumeBool()) what.offsets = !what.offsets && what.code == Code::planes;
    for (int i = data.ConsumeIntegralInRange(0, 8); i > 0 && !file.empty(); --i) {
      file[data.ConsumeIntegralInRange<std::size_t>(0, file.size() - 1)] = data.ConsumeIntegral<char>();
    }
  }
  std::ofstream(path, std::ios::binary).write(file.data(), static_cast<std::streamsize>(file.size()));
  struct Removed { ~Removed() { std::filesystem::remove(path); } } removed;
  try {
    return MatrixStorage::mapped(what, std::make_shared<const MappedFile>(path), begins);
  } catch (const std::invalid_argument&) {
    must(!honest, "a file that was just written is refused");
    return nullptr;
  }
}

// A matrix in any format, prepared, perhaps through a file, and multiplied.
void products(Data& data) {
  const auto rows = data.ConsumeIntegralInRange<std::int64_t>(1, 40), columns = data.ConsumeIntegralInRange<std::int64_t>(1, 150);
  const std::int64_t tiles = (columns + 15) / 16;
  std::int64_t mixed = data.ConsumeBool() ? 16 << data.ConsumeIntegralInRange(0, 3) : 0;
  if (mixed && tiles * 16 % mixed) mixed = 16;
  const int form = data.ConsumeIntegralInRange(0, 3);
  Team& team = *contexts().front()->team;
  const auto signs = numbers<std::uint8_t>(data, static_cast<std::size_t>(tiles * 2));
  const auto kind = data.PickValueInArray({Number::half, Number::bfloat, Number::single});
  Weights weights;
  std::vector<std::vector<std::uint8_t>> kept;
  auto bytes = [&](std::int64_t n) { return kept.emplace_back(numbers<std::uint8_t>(data, static_cast<std::size_t>(n))).data(); };
  if (form == 0) {
    weights = MatrixStorage::dense(bytes(rows * columns * bytes_of(kind)), rows, columns, kind, team);
  } else if (form == 1) {
    TrellisParts parts{};
    parts.rows = rows, parts.columns = columns, parts.mixed = mixed ? mixed : 16;
    parts.code = data.ConsumeBool() ? Code::sum2 : Code::sum4;
    parts.bits = parts.code == Code::sum2 ? 2 : data.ConsumeIntegralInRange(2, 6);
    parts.window = data.ConsumeIntegralInRange(8, 16);
    parts.codes = bytes((rows + 15) / 16 * tiles * 32 * parts.bits);
    parts.scales = reinterpret_cast<const std::uint16_t*>(bytes(2 * rows));
    parts.signs = signs.data();
    weights = MatrixStorage::trellis(parts, team);
  } else {
    QuantizedParts parts{};
    parts.rows = rows, parts.columns = columns, parts.mixed = mixed, parts.apart = form == 3;
    parts.bits = data.ConsumeIntegralInRange(parts.apart ? 3 : 2, 8);
    parts.block_size = (mixed ? 64 : 16) * data.ConsumeIntegralInRange(0, 5);
    parts.scale_kind = kind;
    parts.signs = mixed ? signs.data() : nullptr;
    const auto coded = static_cast<std::size_t>(coded_columns(columns, mixed));
    const std::int64_t blocks = parts.block_size ? (columns + parts.block_size - 1) / parts.block_size : 1;
    for (unsigned width = 8; width > 0; width /= 2) {
      if (!parts.apart && static_cast<unsigned>(parts.bits) & width)
        parts.planes.push_back(bytes(rows * static_cast<std::int64_t>(plane_row_bytes(coded, width))));
    }
    for (int i = 0; parts.apart && i < parts.bits - 1; ++i)
      parts.planes.push_back(bytes(rows * static_cast<std::int64_t>(plane_row_bytes(coded, i ? 1 : 2))));
    parts.scales = bytes(rows * blocks * bytes_of(kind));
    parts.offsets = data.ConsumeBool() ? bytes(rows * blocks * bytes_of(kind)) : nullptr;
    parts.codebook = reinterpret_cast<const float*>(bytes(4 << parts.bits));
    weights = MatrixStorage::quantized(parts, team);
  }
  if (data.ConsumeBool()) {
    const auto count = data.ConsumeIntegralInRange<std::size_t>(0, 20);
    std::vector<std::int32_t> at_rows(count), at_columns(count);
    for (auto& row : at_rows) row = static_cast<std::int32_t>(data.ConsumeIntegralInRange<std::int64_t>(-1, rows));
    for (auto& column : at_columns) column = static_cast<std::int32_t>(data.ConsumeIntegralInRange<std::int64_t>(-1, columns));
    if (data.ConsumeBool()) std::sort(at_rows.begin(), at_rows.end());
    try {
      weights->keep_apart(at_rows.data(), at_columns.data(), numbers<float>(data, count).data(), static_cast<std::int64_t>(count));
    } catch (const std::invalid_argument&) {
      return;
    }
  }
  if (data.ConsumeBool() && !(weights = mapped_again(data, *weights))) return;
  const auto compute = data.ConsumeBool() ? Compute::int8 : Compute::fp32;
  const auto texts = data.ConsumeIntegralInRange<std::int64_t>(1, 5);
  const auto hidden = numbers<float>(data, static_cast<std::size_t>(texts * columns));
  std::vector<float> plain;
  for (const auto& context : contexts()) {
    Program program(context, compute);
    program.finish(program.buffer(columns));
    MatmulInstruction head;
    head.weights = {weights};
    head.biases = {{}};
    program.set_head(std::move(head));
    std::vector<float> out(static_cast<std::size_t>(texts * weights->matrix().rows));
    program.logits(hidden.data(), texts, out.data());
    if (plain.empty()) plain = out;
    if (!std::ranges::all_of(plain, [](float v) { return std::isfinite(v); })) continue;
    must(std::memcmp(out.data(), plain.data(), out.size() * sizeof(float)) == 0, "instruction sets differ");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0) return 0;
  Data data(bytes + 1, size - 1);
  constexpr void (*kTargets[])(Data&) = {byte_pairs, codes, sampler, kv_pages, products};
  kTargets[bytes[0] % std::size(kTargets)](data);
  return 0;
}
