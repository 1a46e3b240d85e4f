#include "isa/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "isa/kernel_table.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))  // MSVC is not a target
#define KBIT_X86_64 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace kbit {
namespace {

#if defined(KBIT_X86_64)

// Read here and not with __builtin_cpu_supports: GCC 12 has no names for AMX.
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

bool all_bits(uint64_t value, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [value](int bit) { return value >> bit & 1; });
}

// XCR0: the register states that the operating system saves.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux gives a process the 8 KiB of tile state (XFEATURE_XTILEDATA, 18) only after ARCH_REQ_XCOMP_PERM.
[[maybe_unused]] bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> detect() {
  std::vector<std::string> names = {"scalar"};
  const Cpuid basic(1, 0), extended(7, 0);
  const int os_saves_states = 27, avx = 28, fma = 12, f16c = 29;
  if (!all_bits(basic.c, {os_saves_states, avx, fma, f16c})) return names;
  const uint64_t states = saved_states();
  if (!all_bits(states, {1, 2}) || !all_bits(extended.b, {5})) return names;  // XMM, YMM; AVX2
  names.push_back("avx2");
  const bool zmm = all_bits(states, {5, 6, 7});
  if (!zmm || !all_bits(extended.b, {16, 17, 30, 31}) || !all_bits(extended.c, {11})) return names;  // F DQ BW VL; VNNI
  names.push_back("avx512vnni");
  const bool more = extended.a >= 1 && all_bits(Cpuid(7, 1).a, {5});  // BF16
  if (!more || !all_bits(extended.c, {1, 6})) return names;          // VBMI, VBMI2
  names.push_back("avx512bf16");
#if defined(KBIT_HAS_AMX)
  const bool tiles = all_bits(states, {17, 18}) && all_bits(extended.d, {22, 24, 25});  // BF16, TILE, INT8
  if (tiles && tiles_permitted()) names.push_back("amx");
#endif
  return names;
}

#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))

std::vector<std::string> detect() {
#if defined(__linux__)
  // The kernel's numbers, which older headers lack: HWCAP_ASIMDDP and HWCAP2_I8MM.
  const bool dot_product = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
#else
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  const bool dot_product = has("hw.optional.arm.FEAT_DotProd"), i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  std::vector<std::string> names = {"scalar"};
  if (dot_product) names.push_back("neon");
  if (dot_product && i8mm) names.push_back("i8mm");
  return names;
}

#else

std::vector<std::string> detect() { return {"scalar"}; }

#endif

// Those that are compiled in.
std::vector<std::string> compiled(std::vector<std::string> names) {
  const auto absent = [](const std::string& name) { return find_kernels(name.c_str()) == nullptr; };
  names.erase(std::remove_if(names.begin(), names.end(), absent), names.end());
  return names;
}

}  // namespace

const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> names = compiled(detect());
  return names;
}

const std::vector<std::string>& emulated_sets() {
  static const std::vector<std::string> names = compiled({"amx-emulated"});
  return names;
}

const std::vector<std::string>& compiled_sets() {
  static const std::vector<std::string> names =
      compiled({"scalar", "avx2", "avx512vnni", "avx512bf16", "amx", "neon", "i8mm", "amx-emulated"});
  return names;
}

std::string choose_instruction_set(const std::string& wanted) {
  const std::vector<std::string>&names = instruction_sets(), &emulated = emulated_sets();
  if (std::find(emulated.begin(), emulated.end(), wanted) != emulated.end()) return wanted;
  const char* variable = wanted.empty() ? std::getenv("KBIT_CPU_ISA") : nullptr;
  const std::string name = variable ? variable : wanted;
  if (name.empty()) return names.back();
  if (std::find(names.begin(), names.end(), name) != names.end()) return name;
  std::string message = variable ? "KBIT_CPU_ISA=" : "instruction set ";
  message += name + " is not one that this machine has; choose one of: ";
  for (size_t i = 0; i < names.size(); ++i) message += (i ? ", " : "") + names[i];
  throw std::invalid_argument(message + (variable ? ", or unset it" : ""));
}

}  // namespace kbit
