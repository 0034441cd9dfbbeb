"""``python -m bench.gpu_model``: cost of kernels and steps on GPUs, counted and predicted.

Compiles every kernel of the named CUDA workloads for each architecture with each Triton,
disassembles it, records the steps on a fake device, and predicts their time. Needs no GPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import budgets
from .chips import CHIPS
from .report import write
from .steps import KERNELS, MODELED
from .tritons import tritons, unpacked
from .worker import MODEL, ROOT, run


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__)
    parser.add_argument(
        "--triton-path",
        type=Path,
        action="append",
        default=[],
        help="folder with another Triton, as `pip install --no-deps --target` leaves it; "
        "besides those that `make env` has unpacked; repeatable",
    )
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=sorted(CHIPS),
        help="such as 90; repeatable; default: all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results" / "gpu_model.json",
        help="JSON file; Markdown goes beside it",
    )
    parser.add_argument(
        "--update-budgets",
        action="store_true",
        help=f"make what is counted the new {budgets.PATH.relative_to(ROOT)}",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    found = tritons([*options.triton_path, *unpacked()])
    if not found:
        print("no Triton to compile with", file=sys.stderr)
        return 1
    # Kernels first: budgets are those of the first step that launches one.
    names = dict.fromkeys([*KERNELS, *MODELED])
    tasks = [MODEL + name if name in MODELED else name for name in names]
    results = run(tasks, found, options.arch or sorted(CHIPS))
    words = ["python", "-m", "bench.gpu_model"]
    words += [word for one in options.arch or [] for word in ("--arch", str(one))]
    print(write(results, shlex.join(words), options.out))
    of_workloads = [kernel for kernel in results.kernels if kernel.label in KERNELS]
    if options.update_budgets:
        budgets.update(of_workloads)
        return 0
    broken = budgets.violations(of_workloads, budgets.load())
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
