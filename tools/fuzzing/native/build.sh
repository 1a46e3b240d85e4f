#!/usr/bin/env bash
# Builds the C++ of kbit with Clang's coverage and ASan, and gives its entry points input that libFuzzer chooses.
#
#   tools/fuzzing/native/build.sh [LIBFUZZER FLAG..]           # by default -max_total_time=60
#   tools/fuzzing/native/build.sh crash-0123..                 # one input again
#
# BUILD: where to build and to keep the corpus, by default build/fuzz. Needs clang++ 14 or later with its runtimes (Debian:
# clang, libclang-rt-dev), cmake, ninja, and the package nanobind. KBIT_SANITIZE_SETS: the instruction sets to build besides
# the plain one, by default none ("avx2"); what they compute is compared.
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
build=${BUILD:-$root/build/fuzz}
mkdir -p "$build/corpus"
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=clang++ \
  -DPython_EXECUTABLE="$(command -v python)" -DKBIT_KERNEL_SETS="scalar;${KBIT_SANITIZE_SETS:-}" -DKBIT_SANITIZE="address;fuzzer-no-link" >"$build/cmake.log"
cmake --build "$build" --target engine | tail -n 1
mapfile -t objects < <(find "$build/CMakeFiles/engine.dir" -name '*.o')
clang++ -std=c++20 -O1 -g1 -fno-omit-frame-pointer -fsanitize=fuzzer,address -I"$root/kernels/cpu" \
  "$root/tools/fuzzing/native/entry_points.cpp" "${objects[@]}" -pthread -o "$build/entry_points"
if [ $# -eq 0 ]; then set -- -max_total_time=60; fi
# (Asking for too much memory is an input like others: it must throw.)
export ASAN_OPTIONS=allocator_may_return_null=1
if [ -f "$1" ]; then exec "$build/entry_points" "$@"; fi
exec "$build/entry_points" -max_len=2048 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$build/" \
  "$@" "$build/corpus"
