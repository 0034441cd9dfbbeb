#!/usr/bin/env bash
# Builds the CPU extension with AddressSanitizer and UndefinedBehaviorSanitizer beside a copy of the
# package, and runs what reaches every kernel; then the fused CUDA kernels, emulated. A report ends
# the process that caused it.
#
# usage: sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$1")
root=$PWD
build=$root/build/sanitize
compiler=${CXX:-c++}
export PATH="$(dirname "$python"):$PATH"

mkdir -p "$build/tree"
rm -rf "$build/tree/python_tests" "$build/tree/unitsface_kernels"
cp -r python_tests unitsface_kernels pyproject.toml "$build/tree"
rm -f "$build"/tree/unitsface_kernels/_native*.so
cmake -S . -B "$build/cmake" -G Ninja -DUNITSFACE_SANITIZE=ON -DUNITSFACE_CUDA=OFF \
  -DPython_EXECUTABLE="$python" \
  -DCMAKE_INSTALL_PREFIX="$build/tree/unitsface_kernels" > "$build/configure.log"
cmake --build "$build/cmake"
cmake --install "$build/cmake" > /dev/null

cd "$build/tree"
# Python's own allocator would hide what lies behind an object; what it keeps until the end is no leak.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:alloc_dealloc_mismatch=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONMALLOC=malloc
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
run() { LD_PRELOAD="$libraries" "$python" -m "$@"; }
tests() { run pytest -q -x -p no:cacheprovider "$@"; }
fuzz() { run python_tests.fuzz "$1" --runs "$2" --seed 0; }
units() {
  tests python_tests/kernels/test_operands.py -k "native or extension or operator"
  tests python_tests/build/test_build.py python_tests/build/test_threads.py \
    -k "number_of_threads or exp or softplus or calls"
  # As many runs on every machine.
  fuzz differential 184
  fuzz modules 73
  fuzz metrics 62
}
tests_of_losses() {
  tests python_tests/kernels/test_parity.py \
    -k "native and (base or empty or no-rows or ignored or subset) and not float16"
  tests python_tests/distributed/test_sampling.py python_tests/kernels/test_gemm.py \
    python_tests/metrics/test_histogram_kernel.py python_tests/kernels/test_row_optimizers.py -k "not isa and not triton"
}
# The extension of the emulated kernels is built by the test, which skips where it cannot.
emulated() {
  cd "$root"
  "$python" -m pytest -q -x -p no:cacheprovider -m slow python_tests/kernels/test_fused_cuda.py -k sanitizers
}
# Most of the time is spent on one core. Each half is a process group, so that it can be ended with all
# that it has started: what goes on would find its directory gone.
set -m
(set -e; units) & first=$!
(set -e; tests_of_losses; emulated) & second=$!
set +m
stop() {
  trap - EXIT
  kill -- -"$first" -"$second" 2> /dev/null || true
  wait
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wait $first && wait $second
