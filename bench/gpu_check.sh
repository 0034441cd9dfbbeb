#!/usr/bin/env bash
# All checks that need a CUDA machine, in one command of under nine minutes.
set -uo pipefail

usage() {
  cat <<'HELP'
usage: bench/gpu_check.sh [options] [WORKLOAD ...]

Builds, tests, sanitizes, profiles and benchmarks on a CUDA machine without a network. Stages go on
after failures, each within a limit of its own, all within the budget. Needs a Python with Torch,
Triton, NumPy, pytest, setuptools, cmake, ninja and pybind11, and nvcc.

  --out DIR       logs and results, at most eight small files (default: $OUT or bench/results/gpu)
  --wheels DIR    pure-Python wheels to install first, where there is no registry; useful ones:
                  hypothesis sortedcontainers pytest-benchmark pytest-xdist execnet py-cpuinfo
                  pytorch-metric-learning liger-kernel cut-cross-entropy inf-cl
  --only A,B      stages: env build tests sanitize profile bench
  --tests EXPR    pytest -k expression; "" runs the whole suite (default: tests of the device)
  --seconds S     per workload of the benchmark (default: 2)
  --budget S      for everything together (default: 530)
  --dry-run       print what every stage would run
  WORKLOAD ...    of python -m bench (default: all for CUDA)

PYTHON names the interpreter (default: python3). The exit status is the sum of the stages that
failed: env 1, build 2, tests 4, sanitize 8, profile 16, bench 32; 64 for a wrong option.
HELP
}

STAGES=(env build tests sanitize profile bench)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/bench/results/gpu}
wheels='' dry=0 seconds=2 budget=530
only=$(IFS=,; echo "${STAGES[*]}")
tests='(cuda or triton_kernels or autotune or histogram_kernel or gpu) and not codegen'
workloads=()

wrong() {
  echo "gpu_check: $1" >&2
  usage >&2
  exit 64
}

while (($#)); do
  case $1 in
    --out | --wheels | --only | --tests | --seconds | --budget)
      (($# > 1)) || wrong "$1 needs a value"
      case $1 in
        --out) out=$2 ;;
        --wheels) wheels=$2 ;;
        --only) only=$2 ;;
        --tests) tests=$2 ;;
        --seconds) seconds=$2 ;;
        --budget) budget=$2 ;;
      esac
      shift
      ;;
    --dry-run) dry=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) wrong "unknown option $1" ;;
    *) workloads+=("$1") ;;
  esac
  shift
done
for name in ${only//,/ }; do
  [[ " ${STAGES[*]} " == *" $name "* ]] || wrong "unknown stage $name"
done
[[ $budget =~ ^[0-9]+$ ]] || wrong "--budget takes whole seconds"
[[ -z $wheels || -d $wheels ]] || wrong "no folder $wheels"
((dry)) || mkdir -p "$out" || exit 64
# Before the change of folder; it may not exist in a dry run.
out=$(cd "$out" 2>/dev/null && pwd || echo "$out")
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)
cd "$root" || exit 64

# nvcc and compute-sanitizer are often in one folder that is not on the PATH.
toolkit=${CUDA_HOME:-/usr/local/cuda}
for folder in "$toolkit/bin" "$toolkit/compute-sanitizer"; do
  [[ -d $folder ]] && PATH=$PATH:$folder
done
export PATH PYTHONUNBUFFERED=1
# The scripts run as modules of the checkout, which may not be installed.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
SECONDS=0

# run LIMIT LOG COMMAND...: appends to the log; the limit is at most the remaining budget.
run() {
  local limit=$1 log=$2
  shift 2
  if ((dry)); then
    local line="${*//$'\n'/ }"
    printf '  %4d s  %-16s %s\n' "$limit" "$log" "${line:0:240}"
    return 0
  fi
  local left=$((budget - SECONDS))
  ((limit > left)) && limit=$left
  printf '$ %s\n' "$*" >>"$out/$log"
  if ((limit < 1)); then
    echo 'not run: the budget is spent' >>"$out/$log"
    return 124
  fi
  # On an interrupt pytest prints its summary.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$out/$log" 2>&1
}

# Keeps the start and the end of a long log.
trim() {
  local file=$out/$1
  if ((dry)) || [[ ! -f $file ]] || (($(wc -c <"$file") < 1000000)); then return; fi
  { head -c 100000 "$file"; printf '\n... cut ...\n'; tail -c 800000 "$file"; } >"$file.cut"
  mv "$file.cut" "$file"
}

stage_env() {
  local status=0
  run 20 environment.txt nvidia-smi || status=1
  run 20 environment.txt nvcc --version || status=1
  run 60 environment.txt "$python" -c '
import importlib.metadata, platform, torch
print("Python", platform.python_version(), platform.machine())
for name in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis",
             "pytorch-metric-learning", "liger-kernel", "cut-cross-entropy", "inf-cl"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing")
if not torch.cuda.is_available():
    raise SystemExit("Torch finds no CUDA device")
print(torch.cuda.get_device_properties(0))' || status=1
  return $status
}

stage_build() {
  local wheel
  if [[ -n $wheels ]]; then
    # One by one, so that an incompatible wheel does not block the others.
    for wheel in "$wheels"/*.whl; do
      [[ -e $wheel ]] || continue
      run 60 build.log "$python" -m pip install --quiet --no-index --no-deps "$wheel" ||
        echo "not installed: $wheel" >>"$out/build.log"
    done
  fi
  run 150 build.log "$python" -m pip install --quiet --no-build-isolation --no-deps -e . ||
    # The stages below run in the checkout: an extension compiled in place suffices.
    run 150 build.log "$python" setup.py build_ext --inplace || return 1
  run 60 build.log "$python" -m unitsface_kernels
}

stage_tests() {
  local workers=() select=()
  "$python" -c 'import xdist' >/dev/null 2>&1 && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  [[ -n $tests ]] && select=(-k "$tests")
  run 150 tests.log "$python" -m pytest python_tests -q --tb=short -rfE --maxfail=200 \
    ${workers[@]+"${workers[@]}"} ${select[@]+"${select[@]}"}
}

stage_sanitize() {
  local status=0 options=(--print-limit 20 --error-exitcode 9 --target-processes application-only)
  if ! ((dry)) && ! command -v compute-sanitizer >/dev/null; then
    echo 'compute-sanitizer is not on the PATH and not in the CUDA toolkit' >>"$out/sanitize.log"
    return 1
  fi
  # Without caching, an access out of bounds is not hidden inside a cached block.
  run 60 sanitize.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    --report-api-errors no "${options[@]}" \
    "$python" -m bench.gpu_small_cases --dtypes bfloat16 || status=1
  run 60 sanitize.log compute-sanitizer --tool racecheck "${options[@]}" \
    "$python" -m bench.gpu_small_cases --dtypes bfloat16 || status=1
  return $status
}

stage_profile() {
  local status=0
  run 90 bench.log "$python" -m bench.gpu_profile --out "$out/profile.json" || status=$?
  # The table is in the log, which limits the number of files.
  run 60 bench.log "$python" -m bench.heads --device=cuda --rounds 5 --out "${TMPDIR:-/tmp}/heads" \
    head-400k head-400k-sampled || status=$?
  run 40 bench.log "$python" train/main.py --config train/configs/data/casia_r50.yaml \
    --config train/configs/loss/unitsface.yaml --dry-run --dry-run-batch 128 train.device=cuda ||
    status=$?
  return $status
}

stage_bench() {
  # Last, with all of the remaining budget.
  run "$budget" bench.log "$python" -m bench --device cuda --seconds "$seconds" \
    --out "$out/cuda" ${workloads[@]+"${workloads[@]}"}
}

if ! ((dry)); then
  # Logs of an earlier run, which would be appended to.
  (cd "$out" && rm -f environment.txt build.log tests.log sanitize.log bench.log)
fi
failed=0
weight=1
summary=()
for name in "${STAGES[@]}"; do
  if [[ ,$only, == *,$name,* ]]; then
    echo "== $name"
    begun=$SECONDS
    "stage_$name"
    status=$?
    case $status in
      0) verdict=ok ;;
      124 | 137) verdict='out of time' ;;
      *) verdict=FAILED ;;
    esac
    ((status)) && ((failed += weight))
    summary+=("$(printf '%-10s %-12s %4d s' "$name" "$verdict" $((SECONDS - begun)))")
  fi
  ((weight *= 2))
done
((dry)) && exit 0

for log in environment.txt build.log tests.log sanitize.log bench.log; do trim "$log"; done
echo "== results in $out"
[[ -f $out/tests.log ]] && grep -E '^(FAILED|ERROR) ' "$out/tests.log" | cut -c1-150 | head -n 20
[[ -f $out/tests.log ]] && grep -E '[0-9]+ (passed|failed|error)' "$out/tests.log" | tail -n 1
[[ -f $out/sanitize.log ]] &&
  grep -E '^(FAILED|========= (ERROR|RACECHECK) SUMMARY)|small cases' "$out/sanitize.log" | head -n 20
[[ -f $out/bench.log ]] && awk '/^[$] /{on = /gpu_profile|bench.heads/; next} on' "$out/bench.log" | cut -c1-120
[[ ,$only, == *,bench,* && -f $out/cuda.md ]] && grep '^|' "$out/cuda.md" | cut -c1-160 | head -n 80
printf '%s\n' "${summary[@]}"
exit "$failed"
