#include "program/context.h"

#include <stdexcept>

#include "isa/isa.h"
#include "isa/kernel_table.h"

namespace kbit {

Context::Context(const std::string& isa, int threads) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("a context has 1 to 4096 threads");
  const std::string set = choose_instruction_set(isa);
  kernels = find_kernels(set.c_str());
  if (kernels == nullptr) throw std::invalid_argument("no kernels were compiled for the instruction set " + set);
  team = std::make_unique<Team>(threads);
}

}  // namespace kbit
