// The kernels and the threads that a program runs on.
#pragma once

#include <memory>
#include <string>

#include "isa/kernels.h"
#include "program/threads.h"

namespace kbit {

struct Context {
  // isa: a name instruction_sets() lists, or empty for the best (or what KBIT_CPU_ISA says). threads >= 1.
  // Throws std::invalid_argument.
  Context(const std::string& isa, int threads);

  const Kernels* kernels;
  std::unique_ptr<Team> team;
};

}  // namespace kbit
