#!/bin/sh
# Runs the machine code of the AMX kernels (kernels/cpu/isa/amx.cpp) against the plain C++ ones, byte for byte. AMX
# instructions are executed in software (trap.cpp), so this needs an x86-64 Linux machine with AVX-512 BF16, but no AMX.
#
#   tools/amx/check.sh [BUILD_FOLDER [quick]]      the folder: a temporary one by default; quick: fewer cases, -O1
#
# CXX: the compiler (g++); JOBS: how many of it at a time.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cpu=$root/kernels/cpu
if [ $# -gt 0 ]; then build=$1; mkdir -p "$build"; else build=$(mktemp -d); trap 'rm -rf "$build"' EXIT; fi
best=-O3
if [ "${2:-}" = quick ]; then best=-O1; fi

# compile NAME SOURCE FLAG..: to $build/NAME.o, in the background; join waits.
pids= running=0
join() { for pid in $pids; do wait "$pid"; done; pids= running=0; }
compile() {
  name=$1 source=$2
  shift 2
  "${CXX:-g++}" -std=c++20 $best -ffp-contract=off -Wall -Wextra -Werror -Wno-maybe-uninitialized -I"$cpu" "$@" \
    -c "$source" -o "$build/$name.o" &
  pids="$pids $!" running=$((running + 1))
  if [ "$running" -ge "${JOBS:-$(nproc)}" ]; then join; fi
}

kernels="-fno-math-errno -fno-strict-aliasing"
avx512bf16="-mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni \
  -mprefer-vector-width=512 -mavx512vbmi -mavx512bf16 -Wno-uninitialized"
compile isa_avx512bf16 "$cpu/isa/avx512bf16.cpp" $kernels $avx512bf16
compile isa_amx "$cpu/isa/amx.cpp" $kernels $avx512bf16
compile isa_scalar "$cpu/isa/scalar.cpp" $kernels -O1
compile isa_amx_emulated "$cpu/isa/amx_emulated.cpp" $kernels -Os
for source in "$cpu"/codecs/*.cpp "$cpu"/attention/*.cpp "$cpu/program/threads.cpp" "$cpu/rounding/trellis.cpp"; do
  compile "$(basename "$source" .cpp)" "$source"
done
compile kernel_table "$cpu/isa/kernel_table.cpp" -DKBIT_SET_AVX512BF16 -DKBIT_SET_AMX -DKBIT_SET_AMX_EMULATED
compile trap "$root/tools/amx/trap.cpp"
compile kernels_test "$root/tools/kernels_test.cpp" '-DSETS="scalar", "amx-emulated", "amx"'
join

"${CXX:-g++}" "$build"/*.o -pthread -o "$build/kernels_test"
"$build/kernels_test" ${2:-}
