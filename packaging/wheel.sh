#!/usr/bin/env bash
# Builds a source distribution, and from it alone, without a network, the wheel of this platform.
# Both go to dist/. On Linux auditwheel finds the oldest glibc that has all symbols of the wheel,
# names it by that and refuses foreign libraries; abi3audit checks the stable ABI.
#
# usage: wheel.sh PYTHON [sdist]
#   UNITSFACE_CUDA, UNITSFACE_CUDA_ARCHS   as for every build, see docs/install.md; without CUDA kernels
#                                          by default
#   UNITSFACE_LOCAL_VERSION=cu130          after the version: 0.2.0+cu130
#   UNITSFACE_PLATFORM=linux-aarch64       of another processor, by aarch64-linux-gnu.cmake
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
export PATH="$(dirname "$python"):$PATH" UNITSFACE_CUDA=${UNITSFACE_CUDA:-OFF}
work=build/wheel
rm -rf "$work"
mkdir -p "$work" dist

# A folder of its own: the build writes metadata, and lists what earlier builds left.
{ git ls-files -co --exclude-standard 2> /dev/null || find . -type f; } | grep -E '^(\./)?(csrc|unitsface_kernels)/|^(\./)?[^/]*$' | tar -cf - -T - | tar -xf - -C "$work"
(cd "$work" && "$python" setup.py -q sdist --formats gztar --dist-dir dist > sdist.log 2>&1) \
  || { tail -20 "$work/sdist.log" >&2; exit 1; }
sdist=$(ls "$work"/dist/*.tar.gz)
cp "$sdist" dist/
echo "dist/$(basename "$sdist"): $(stat -c %s "$sdist") bytes"
if [ "${2:-}" = sdist ]; then exit 0; fi

if [ -n "${UNITSFACE_LOCAL_VERSION:-}" ]; then
  printf '[egg_info]\ntag_build = +%s\n' "$UNITSFACE_LOCAL_VERSION" > "$work/label.cfg"
  export DIST_EXTRA_CONFIG=$PWD/$work/label.cfg
fi
if [ -n "${UNITSFACE_PLATFORM:-}" ]; then
  # Known to Python's own build tools.
  export _PYTHON_HOST_PLATFORM=$UNITSFACE_PLATFORM
  export CMAKE_TOOLCHAIN_FILE=$PWD/packaging/${UNITSFACE_PLATFORM#linux-}-linux-gnu.cmake
fi
built=$work/built
if [ "$(uname -s)" = Linux ]; then
  export LDFLAGS="-Wl,--gc-sections,--exclude-libs,ALL,-s ${LDFLAGS:-}"
  # The compiler's own C++ library may be newer than those of the systems where the wheel is to run.
  # The compilers of the manylinux images link what is newer in any case.
  case $(${CXX:-c++} -print-file-name=libstdc++.a) in
    /*) LDFLAGS="-static-libstdc++ $LDFLAGS" ;;
  esac
fi
"$python" -m pip wheel --no-deps --no-index --no-build-isolation --wheel-dir "$built" "$sdist"
if [ "$(uname -s)" = Linux ]; then
  auditwheel repair --wheel-dir "$work/repaired" "$built"/*.whl
  built=$work/repaired
fi
for wheel in "$built"/*.whl; do
  case $(uname -s):$wheel in
    Linux:*-abi3-*) abi3audit --strict --report "$wheel" > "$work/abi3.json" || { cat "$work/abi3.json" >&2; exit 1; } ;;
  esac
  cp "$wheel" dist/
  echo "dist/$(basename "$wheel"): $(stat -c %s "$wheel") bytes"
done
