// Parts of the Python module, each in its own file.
#pragma once

#include <nanobind/nanobind.h>

namespace kbit {

void bind_engine(nanobind::module_& module);
void bind_kv_cache(nanobind::module_& module);
void bind_mapped(nanobind::module_& module);

}  // namespace kbit
