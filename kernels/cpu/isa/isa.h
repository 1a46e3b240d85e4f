// Which instruction sets this process may use, and which one it shall.
#pragma once

#include <string>
#include <vector>

namespace kbit {

// The names of the sets that are compiled in and that this machine and its operating system offer, best last:
//   x86-64   scalar, avx2 (with FMA and F16C), avx512vnni (F, BW, DQ, VL, VNNI), avx512bf16 (and VBMI, VBMI2, BF16),
//            amx (and AMX-TILE, INT8, BF16)
//   AArch64  scalar, neon (with the dot product), i8mm
//   others   scalar
// The first call asks Linux for the use of the AMX tiles, once per process; refused, there is no "amx".
const std::vector<std::string>& instruction_sets();

// Sets that plain C++ stands in for: for tests, on any machine, and slow. Used when asked for by name in the call.
const std::vector<std::string>& emulated_sets();

// All that are compiled in, whether or not this machine has them.
const std::vector<std::string>& compiled_sets();

// The set to use: `wanted`, or with an empty one the environment's KBIT_CPU_ISA, or else the best.
// Throws std::invalid_argument, in one line that names where the choice came from and what there is.
std::string choose_instruction_set(const std::string& wanted = "");

}  // namespace kbit
