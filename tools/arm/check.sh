#!/bin/sh
# Compiles all of kernels/cpu but its Python bindings for AArch64, and runs every kernel of the Arm instruction sets
# against the plain C++ ones, byte for byte: with Debian's cross-compiler (g++-aarch64-linux-gnu) and under qemu-user,
# or on an Arm machine with what it has. Elsewhere, the plain kernels' results are compared with this machine's, too.
#
#   tools/arm/check.sh [BUILD_FOLDER [quick]]      the folder: a temporary one by default; quick: fewer cases, -O1
#
# ARM_CXX, CXX: the compilers for Arm and for this machine; JOBS: how many of them at a time.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cpu=$root/kernels/cpu
if [ $# -gt 0 ]; then build=$1; mkdir -p "$build"; else build=$(mktemp -d); trap 'rm -rf "$build"' EXIT; fi
mkdir -p "$build/arm" "$build/native"
arm=${ARM_CXX:-aarch64-linux-gnu-g++} native=${CXX:-c++} run="qemu-aarch64 -cpu max"
case $(uname -m) in aarch64 | arm64) arm=$native run= ;; esac
best=-O3
if [ "${2:-}" = quick ]; then best=-O1; fi

# compile COMPILER FOLDER SOURCE FLAG..: in the background; join waits.
pids= running=0
join() { for pid in $pids; do wait "$pid"; done; pids= running=0; }
compile() {
  compiler=$1 source=$3 object=$build/$2/$(basename "$3" .cpp).o
  shift 3
  "$compiler" -std=c++20 $best -ffp-contract=off -Wall -Wextra -Werror -Wno-maybe-uninitialized -I"$cpu" "$@" \
    -c "$source" -o "$object" &
  pids="$pids $!" running=$((running + 1))
  if [ "$running" -ge "${JOBS:-$(nproc)}" ]; then join; fi
}

kernels="-fno-math-errno -fno-strict-aliasing"
compile "$arm" arm "$cpu/isa/neon.cpp" $kernels -march=armv8.2-a+dotprod
compile "$arm" arm "$cpu/isa/i8mm.cpp" $kernels -march=armv8.2-a+dotprod+i8mm
compile "$arm" arm "$cpu/isa/scalar.cpp" $kernels
compile "$arm" arm "$cpu/isa/amx_emulated.cpp" $kernels -Os
for source in "$cpu"/codecs/*.cpp "$cpu"/attention/*.cpp "$cpu"/program/*.cpp "$cpu/isa/isa.cpp" \
  "$cpu/rounding/trellis.cpp"; do
  compile "$arm" arm "$source"
done
compile "$arm" arm "$cpu/isa/kernel_table.cpp" -DKBIT_SET_NEON -DKBIT_SET_I8MM -DKBIT_SET_AMX_EMULATED
sets='"scalar", "neon", "i8mm", "amx-emulated"'
if [ -z "$run" ] && ! grep -qw i8mm /proc/cpuinfo; then sets='"scalar", "neon", "amx-emulated"'; fi
compile "$arm" arm "$root/tools/kernels_test.cpp" "-DSETS=$sets"
if [ -n "$run" ]; then
  compile "$native" native "$cpu/isa/scalar.cpp" $kernels -O1
  compile "$native" native "$cpu/isa/kernel_table.cpp"
  for source in "$cpu"/codecs/*.cpp "$cpu"/attention/*.cpp "$cpu/program/threads.cpp" "$cpu/rounding/trellis.cpp"; do
    compile "$native" native "$source"
  done
  compile "$native" native "$root/tools/kernels_test.cpp" '-DSETS="scalar"'
fi
join

"$arm" ${run:+-static} "$build"/arm/*.o -pthread -o "$build/arm/kernels_test"
$run "$build/arm/kernels_test" ${2:-} > "$build/arm.txt" || { cat "$build/arm.txt"; exit 1; }
[ -n "$run" ] || exit 0
"$native" "$build"/native/*.o -pthread -o "$build/native/kernels_test"
"$build/native/kernels_test" ${2:-} > "$build/native.txt"
diff "$build/arm.txt" "$build/native.txt"
echo "the same results as on $(uname -m)"
