#!/usr/bin/env bash
# Builds the native module with GCC's sanitizers and runs tests with it: memory errors and what C++ leaves undefined
# (address), or races of threads (thread).
#
#   tools/sanitize.sh address [PYTEST ARGUMENT..]     # ASan and UBSan; by default the tests of kernels and formats, and the fuzzer
#   tools/sanitize.sh thread [PYTEST ARGUMENT..]      # TSan; by default the thread pool, programs and the engine
#   tools/sanitize.sh thread -- COMMAND..             # any command, for example a server under load:
#       -- python $PWD/tools/soak.py MODEL --requests 500 --threads 3 --checked 0 --growth 9
#   tools/sanitize.sh coverage [-- COMMAND..]         # ASan, and what the C++ executes guides atheris; by default
#       -- python $PWD/tools/fuzz.py --target native --minutes 5
#
# KBIT_SANITIZE_SETS: the instruction sets to build, by default those that this machine runs ("scalar;avx512bf16" builds in
# half the time); BUILD: where to build, by default build/sanitize-address and so on. Paths are absolute. Needs the
# [test] extra, GCC on Linux (coverage: Clang, and the package atheris), and the packages nanobind, cmake and ninja.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kind=${1:?address, thread or coverage}
shift
compiler=g++
case $kind in
  coverage) sanitizers="address;fuzzer-no-link" compiler=clang++ ;;
  address) sanitizers="address;undefined" runtime=libasan.so ;;
  thread) sanitizers=thread runtime=libtsan.so ;;
  *) echo "tools/sanitize.sh: $kind is none of address, thread, coverage" >&2; exit 2 ;;
esac
build=${BUILD:-$root/build/sanitize-$kind}
sets=${KBIT_SANITIZE_SETS:-scalar}
if [ -z "${KBIT_SANITIZE_SETS:-}" ] && [ "$(uname -m)" = x86_64 ]; then
  if grep -qw avx2 /proc/cpuinfo; then sets="$sets;avx2"; fi
  if grep -qw avx512_vnni /proc/cpuinfo; then sets="$sets;avx512vnni"; fi
  if grep -qw avx512_bf16 /proc/cpuinfo; then sets="$sets;avx512bf16"; fi
elif [ -z "${KBIT_SANITIZE_SETS:-}" ] && [ "$(uname -m)" = aarch64 ]; then
  if grep -qw asimddp /proc/cpuinfo; then sets="$sets;neon"; fi
  if grep -qw i8mm /proc/cpuinfo; then sets="$sets;i8mm"; fi
fi
mkdir -p "$build"
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_CXX_COMPILER="$compiler" -DKBIT_KERNEL_SETS="$sets" -DKBIT_SANITIZE="$sanitizers" >"$build/cmake.log"
cmake --build "$build" | tail -n 1

# A view of the package with that module, as tools/typecheck.sh makes one.
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT
mkdir "$view/kbit"
for path in "$root"/kbit/*; do
  case $path in *.so | */kernels) ;; *) ln -s "$path" "$view/kbit/" ;; esac
done
ln -s "$root/kernels" "$view/kbit/kernels"
ln -s "$build"/_native*.so "$view/kbit/"

# Leaks are not looked for: Python and torch end without freeing what they have. What is not instrumented (Python, torch)
# takes part in no race that TSan reports. libstdc++ comes first, so that what torch throws is seen.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=suppressions=$root/tools/tsan_suppressions.txt:ignore_noninstrumented_modules=1:exitcode=66:log_path=$build/tsan
if [ "$kind" = coverage ]; then
  runtime=$(python -c "import atheris; print(atheris.path())")/asan_with_fuzzer.so
  if [ $# -eq 0 ]; then set -- -- python "$root/tools/fuzz.py" --target native --minutes 5; fi
else
  runtime=$(gcc -print-file-name=$runtime)
fi
runtimes="$runtime $(gcc -print-file-name=libstdc++.so)"
if [ $# -eq 0 ] && [ "$kind" = address ]; then
  set -- "$root"/tests/kernels/cpu "$root"/tests/kernels/test_level_tables.py "$root"/tests/formats/test_bitplanes.py \
    "$root"/tests/formats/test_trellis.py "$root"/tests/backends/test_native_backend.py \
    "$root"/tests/backends/test_native_parity.py "$root"/tests/backends/test_prepared.py "$root"/tests/tools/test_fuzz.py
elif [ $# -eq 0 ]; then
  set -- "$root"/tests/kernels/cpu/test_native_same_bits.py "$root"/tests/backends/test_native_backend.py \
    "$root"/tests/engine/test_engine_thread.py "$root"/tests/engine/test_batch_engine.py
fi
rm -f "$build"/tsan.*
cd "$view"
if [ "${1:-}" = -- ]; then
  shift  # (in this folder, as Python looks for kbit where it is started)
else
  set -- python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "$@"
fi
# TSan wants addresses where it expects them: no random ones, where that can be said.
still=()
if [ "$kind" = thread ] && setarch -R true 2>/dev/null; then still=(setarch -R); fi
LD_PRELOAD=$runtimes PYTHONPATH=$view:${PYTHONPATH:-} PYTHONMALLOC=malloc "${still[@]}" "$@" || result=$?
# (pytest keeps what a process writes, so reports go to files.)
if compgen -G "$build/tsan.*" >/dev/null; then cat "$build"/tsan.*; exit 66; fi
exit "${result:-0}"
