#!/usr/bin/env bash
# Builds the CPU extension with AddressSanitizer and UndefinedBehaviorSanitizer beside a copy of the
# package, and runs what reaches every kernel. A report ends the process that caused it.
#
# usage: sanitize.sh PYTHON [SECONDS of fuzzing]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$1")
seconds=${2:-20}
build=$PWD/build/sanitize
compiler=${CXX:-c++}
export PATH="$(dirname "$python"):$PATH"

mkdir -p "$build/tree"
rm -rf "$build/tree/python_tests" "$build/tree/unitsface_kernels"
cp -r python_tests unitsface_kernels pyproject.toml "$build/tree"
rm -f "$build"/tree/unitsface_kernels/_native*.so
cmake -S . -B "$build/cmake" -G Ninja -DUNITSFACE_SANITIZE=ON -DUNITSFACE_CUDA=OFF \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
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
units() {
  tests python_tests/kernels/test_operands.py -k "native or extension or operator"
  tests python_tests/build/test_build.py python_tests/build/test_threads.py \
    -k "number_of_threads or exp or softplus or calls"
  run python_tests.fuzz differential modules metrics --seconds "$seconds" --seed 0
}
tests_of_losses() {
  tests python_tests/kernels/test_parity.py \
    -k "native and (base or empty or no-rows or ignored or subset) and not float16"
  tests python_tests/distributed/test_sampling.py python_tests/kernels/test_gemm.py \
    python_tests/metrics/test_histogram_kernel.py python_tests/kernels/test_row_optimizers.py -k "not isa and not triton"
}
# Most of the time is spent on one core.
(set -e; units) & first=$!
(set -e; tests_of_losses) & second=$!
wait $first && wait $second
