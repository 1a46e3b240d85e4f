// Parts of the Python module, each in its own file.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

#include "codecs/matrix.h"

namespace kbit {

class KVPages;
class Program;

// "fp16", "bf16", "fp32" or "fp32-steps". Throws std::invalid_argument for another name.
Number number_named(const std::string& name);

// "planes", "sum2" or "sum4". Throws std::invalid_argument for another name.
Code code_named(const std::string& name);
// Throw std::invalid_argument for what no trellis and no rotation is.
void require_trellis(Code code, int bits, bool half, int window);
void require_mixed(std::int64_t mixed, std::int64_t columns);

using BlockTables = nanobind::ndarray<const std::int32_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

// Checks that every token's sequence has pages for it and for all tokens before it. Throws std::invalid_argument.
void require_pages(const KVPages& pages, const BlockTables& tables, const std::int32_t* sequence,
                   const std::int32_t* position, std::size_t rows);

void bind_matrix(nanobind::module_& module);
void bind_program(nanobind::module_& module);
void bind_pass(nanobind::class_<Program>& program);
void bind_kv_pages(nanobind::module_& module);
void bind_sizes(nanobind::module_& module);
void bind_mapped(nanobind::module_& module);
void bind_rounding(nanobind::module_& module);
void bind_text(nanobind::module_& module);
void bind_levels(nanobind::module_& module);
void bind_trellis(nanobind::module_& module);
void bind_sampling(nanobind::module_& module);

}  // namespace kbit
