// Executes AMX instructions in software where the processor has none: linked into a program, it catches the fault that
// each of them raises (SIGILL), decodes the instruction, does its work and goes on behind it. So the machine code of
// the AMX kernels runs, slowly, on any x86-64 Linux machine that has the other instructions in it.
//
// Encodings, operand order, faults and rounding follow the Intel SDM, volume 2. What would fault on the hardware (no
// configuration, shapes that do not fit) ends the program with a message. Written apart from simd/amx_tiles.h, whose
// assembly and emulation it checks.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  std::uint8_t at[16][64];
};
struct State {
  bool configured;
  int rows[8], row_bytes[8];
  Tile tile[8];
};
thread_local State state;
std::atomic<long> executed{0};

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "AMX trap: %s\n", what);
  std::_Exit(3);
}

// General registers in the order of their numbers.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// VEX map 2 (0F 38) in its three-byte form: C4 | R X B map | W vvvv L pp | opcode | ModRM | SIB | displacement.
struct Instruction {
  int prefix;  // pp: 0 none, 1 66, 2 F3, 3 F2
  int opcode, mod, reg, rm, vvvv;
  std::uint8_t* address = nullptr;  // of the operand in memory, without a scaled index
  std::int64_t index = 0;           // index register times scale
  bool sib = false;
  int length;

  Instruction(const std::uint8_t* code, const greg_t* registers) {
    const auto value = [&](int number) { return static_cast<std::int64_t>(registers[kRegisters[number]]); };
    if (code[0] != 0xc4 || (code[1] & 31) != 2) fault("an illegal instruction that is not of AMX");
    const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
    if (code[2] & 0x84) fault("VEX.W or VEX.L is set");
    vvvv = ~code[2] >> 3 & 15;
    prefix = code[2] & 3;
    opcode = code[3];
    mod = code[4] >> 6;
    reg = (code[4] >> 3 & 7) | r << 3;
    rm = (code[4] & 7) | b << 3;
    length = 5;
    if (mod == 3) return;
    std::int64_t base = 0;
    int base_number = rm & 7;
    if (base_number == 4) {
      const int byte = code[length++];
      sib = true;
      base_number = byte & 7;
      const int index_number = (byte >> 3 & 7) | x << 3;
      if (index_number != 4) index = value(index_number) * (std::int64_t{1} << (byte >> 6));
    }
    std::int64_t displacement = 0;
    const bool no_base = mod == 0 && base_number == 5;
    if (mod == 1) {
      displacement = static_cast<std::int8_t>(code[length]);
      length += 1;
    } else if (mod == 2 || no_base) {
      std::int32_t wide;
      std::memcpy(&wide, code + length, 4);
      displacement = wide;
      length += 4;
    }
    if (!no_base) base = value(base_number | b << 3);
    else if (!sib) base = reinterpret_cast<std::int64_t>(code) + length;  // relative to the next instruction
    address = reinterpret_cast<std::uint8_t*>(base + displacement);
  }
};

int tile_number(int number) {
  if (!state.configured) fault("a tile is used without a configuration");
  if (number > 7 || state.rows[number] == 0) fault("a tile is used that was not configured");
  return number;
}

void load_configuration(const std::uint8_t* config) {
  std::memset(&state, 0, sizeof state);
  if (config[0] == 0) return;
  if (config[0] != 1 || config[1] != 0) fault("ldtilecfg: not palette 1 from row 0");
  for (int i = 2; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && config[i] != 0) fault("ldtilecfg: a reserved byte is set");
  }
  for (int t = 0; t < 8; ++t) {
    std::uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * t, 2);
    const int rows = config[48 + t];
    if (bytes > 64 || rows > 16 || (bytes == 0) != (rows == 0)) fault("ldtilecfg: a tile's shape");
    state.rows[t] = rows;
    state.row_bytes[t] = bytes;
  }
  state.configured = true;
}

float bfloat(const std::uint8_t* p) {
  const std::uint32_t bits = std::uint32_t{p[0]} << 16 | std::uint32_t{p[1]} << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float no_subnormal(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

// C += A B of bfloat16 pairs, or of bytes with or without signs.
void dot(int c, int a, int b, bool bf16, bool a_signed, bool b_signed) {
  tile_number(c), tile_number(a), tile_number(b);
  if (c == a || c == b || a == b) fault("a multiplication's tiles are not three");
  if (state.row_bytes[a] % 4 || state.row_bytes[b] % 4 || state.rows[a] != state.rows[c] ||
      state.row_bytes[a] / 4 != state.rows[b] || state.row_bytes[b] != state.row_bytes[c]) {
    fault("a multiplication's tiles do not fit");
  }
  Tile result{};
  for (int m = 0; m < state.rows[c]; ++m) {
    for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
      std::uint8_t* out = result.at[m] + 4 * n;
      std::memcpy(out, state.tile[c].at[m] + 4 * n, 4);
      if (bf16) {
        float sums[2] = {0.0f, 0.0f};
        for (int k = 0; k < state.row_bytes[a] / 4; ++k) {
          for (int j = 0; j < 2; ++j) {
            const float left = no_subnormal(bfloat(state.tile[a].at[m] + 4 * k + 2 * j));
            const float right = no_subnormal(bfloat(state.tile[b].at[k] + 4 * n + 2 * j));
            sums[j] = no_subnormal(std::fma(left, right, sums[j]));
          }
        }
        float value;
        std::memcpy(&value, out, 4);
        value = no_subnormal(no_subnormal(value) + no_subnormal(sums[0] + sums[1]));
        std::memcpy(out, &value, 4);
        continue;
      }
      std::uint32_t sum;  // wraps around
      std::memcpy(&sum, out, 4);
      for (int i = 0; i < state.row_bytes[a]; ++i) {
        const std::uint8_t left = state.tile[a].at[m][i], right = state.tile[b].at[i / 4][4 * n + i % 4];
        const std::int32_t l = a_signed ? static_cast<std::int8_t>(left) : left;
        const std::int32_t r = b_signed ? static_cast<std::int8_t>(right) : right;
        sum += static_cast<std::uint32_t>(l * r);
      }
      std::memcpy(out, &sum, 4);
    }
  }
  state.tile[c] = result;
}

void execute(const Instruction& i) {
  constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;
  const bool memory = i.mod != 3;
  if (i.opcode == 0x49 && i.prefix == kNone && memory && i.reg == 0) {
    load_configuration(i.address);
  } else if (i.opcode == 0x49 && i.prefix == kNone && !memory && i.reg == 0 && i.rm == 0) {
    std::memset(&state, 0, sizeof state);
  } else if (i.opcode == 0x49 && i.prefix == kF2 && !memory) {
    state.tile[tile_number(i.reg)] = {};
  } else if (i.opcode == 0x4b && i.sib && (i.prefix == kF2 || i.prefix == k66)) {
    const int t = tile_number(i.reg);
    state.tile[t] = {};
    for (int r = 0; r < state.rows[t]; ++r)
      std::memcpy(state.tile[t].at[r], i.address + r * i.index, static_cast<std::size_t>(state.row_bytes[t]));
  } else if (i.opcode == 0x4b && i.sib && i.prefix == kF3) {
    const int t = tile_number(i.reg);
    for (int r = 0; r < state.rows[t]; ++r)
      std::memcpy(i.address + r * i.index, state.tile[t].at[r], static_cast<std::size_t>(state.row_bytes[t]));
  } else if (i.opcode == 0x5c && i.prefix == kF3 && !memory) {
    dot(i.reg, i.rm, i.vvvv, true, true, true);
  } else if (i.opcode == 0x5e && !memory) {
    dot(i.reg, i.rm, i.vvvv, false, i.prefix == kF2 || i.prefix == kF3, i.prefix == kF2 || i.prefix == k66);
  } else {
    fault("an illegal instruction that is not known here");
  }
}

void handle(int, siginfo_t*, void* context) {
  auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* code = reinterpret_cast<const std::uint8_t*>(machine->gregs[REG_RIP]);
  const Instruction instruction(code, machine->gregs);
  execute(instruction);
  machine->gregs[REG_RIP] += instruction.length;
  ++executed;
}

struct Installed {
  Installed() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(SIGILL, &action, nullptr) != 0) fault("no handler for SIGILL");
  }
  ~Installed() { std::fprintf(stderr, "%ld AMX instructions executed in software\n", executed.load()); }
};
const Installed installed;

}  // namespace
