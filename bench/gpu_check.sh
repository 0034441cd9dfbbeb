#!/usr/bin/env bash
# All checks that need a CUDA machine, in one command of under eight minutes: --help.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
