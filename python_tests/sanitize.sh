#!/usr/bin/env bash
# Builds the CPU extension with AddressSanitizer and UndefinedBehaviorSanitizer beside a copy of the
# package, and runs what reaches every kernel. A report ends the process that caused it.
#
# usage: sanitize.sh PYTHON [SECONDS of fuzzing]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
seconds=${2:-40}
tree=build/sanitize/tree
compiler=${CXX:-c++}

mkdir -p "$tree"
rm -rf "$tree/python_tests" "$tree/unitsface_kernels"
cp -r python_tests unitsface_kernels pyproject.toml "$tree"
rm -f "$tree"/unitsface_kernels/_native*.so
cmake -S . -B build/sanitize/cmake -G Ninja -DUNITSFACE_SANITIZE=ON -DUNITSFACE_CUDA=OFF \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DCMAKE_INSTALL_PREFIX="$PWD/$tree/unitsface_kernels" > build/sanitize/configure.log
cmake --build build/sanitize/cmake
cmake --install build/sanitize/cmake > /dev/null

cd "$tree"
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
# Python keeps memory until its end. Its own allocator would hide what lies behind an object.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:alloc_dealloc_mismatch=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONMALLOC=malloc OMP_NUM_THREADS=2
"$python" -m pytest -q -x -p no:cacheprovider python_tests/test_parity.py \
  -k "native and not heavy and (base or columns or empty or no-rows or ignored or memory or subset)"
"$python" -m pytest -q -x -p no:cacheprovider python_tests/test_build.py -k "threads or exp or softplus"
"$python" -m pytest -q -x -p no:cacheprovider python_tests/test_sampling.py \
  python_tests/test_histogram_kernel.py python_tests/test_products.py -k "not isa and not triton"
"$python" -m python_tests.fuzz differential modules metrics --seconds "$seconds" --seed 0
