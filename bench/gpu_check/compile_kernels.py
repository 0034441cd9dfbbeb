"""``python -m bench.gpu_check.compile_kernels``: every Triton kernel, compiled side by side.

Runs small cases and named steps in worker processes, because a kernel is compiled for the
arguments, sizes and launches of a call. Every kernel is compiled before it is launched, so that
its registers are known even if it then fails; Triton's cache keeps it for the later stages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

from unitsface_kernels.backends.triton import launch

from .. import gpu_small_cases
from . import alternatives, pool, steps
from .files import write_json

DTYPES = ("bfloat16", "float32", "float16")
LIMIT_S = 60.0
#: Most rows and columns of a step here: several waves of columns, which the processes' memory has
#: room for, and as divisible as the full sizes, which decides what is compiled.
SIZES = {"rows": 1 << 20, "columns": 300_000}


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the code; nothing without a tool that reads them."""
    packed = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = packed if packed.exists() else shutil.which("cuobjdump")
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "local"}
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
    return {names[name]: int(value) for name, value in found}


def compile_kernel(kernel: Any, *args: Any, **options: Any) -> Any:
    """What a launch with these arguments would run."""
    return kernel.warmup(*args, enable_fp_fusion=True, **options)


@contextmanager
def compiling(found: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Compiles every kernel before its launch, and adds it to ``found`` by its hash."""
    run = launch.run

    def compile_and_run(kernel: Any, programs: int, *args: Any, **options: Any) -> Any:
        if programs > 0:
            name = kernel.fn.__name__
            start = time.perf_counter()
            try:
                built = compile_kernel(kernel, *args, grid=(programs,), **options)
            except Exception as error:
                found[f"{name} {len(found)}"] = {"kernel": name, "error": pool.describe(error)}
                raise
            seconds = time.perf_counter() - start
            if built.hash not in found:
                found[built.hash] = {
                    "kernel": name,
                    **_usage(built.asm["cubin"]),
                    "shared": built.metadata.shared,
                    "warps": built.metadata.num_warps,
                    "seconds": round(seconds, 2),
                }
        return run(kernel, programs, *args, **options)

    launch.run = compile_and_run
    try:
        yield
    finally:
        launch.run = run


def work(kind: str, name: str, detail: str) -> dict[str, Any]:
    """One task of :func:`tasks`: the kernels that it launches, by hash."""
    found: dict[str, dict[str, Any]] = {}
    wrong: pool.Result = {}
    with compiling(found):
        try:
            if kind == "cases":
                every = gpu_small_cases.checks(("triton",), (detail,), "cuda")
                for case, check in every.items():
                    # Another stage checks the values.
                    if name in case:
                        check()
            elif kind == "step":
                steps.make(name, "triton", **SIZES).run()
            else:
                with alternatives.selected(alternatives.change_of(name, detail)):
                    steps.make(name, "triton", **SIZES).run()
            torch.cuda.synchronize()
        except Exception as error:
            # What it has compiled counts, whatever becomes of the process.
            try:
                wrong = pool.refusal(error, torch.cuda.synchronize)
            except Exception:
                wrong = {"error": pool.describe(error)}
    return {"kernels": found, **wrong}


def tasks(capability: int) -> list[pool.Task]:
    """Steps that are measured later first, then their alternatives, then the rest."""
    found: list[pool.Task] = [("step", name, "") for name in steps.NAMES]
    for step in alternatives.KINDS:
        known = [
            name for name in alternatives.names(step, capability) if name != alternatives.SHIPPED
        ]
        found += [("alternative", step, name) for name in known]
    functions = [*gpu_small_cases.FUNCTIONS, "PartialFC"]
    found += [("cases", name, dtype) for dtype in DTYPES for name in functions]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.compile_kernels")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    # One thread each: the processes share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    todo = tasks(10 * major + minor)
    kernels: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"tasks": len(todo), "done": 0, "failures": {}, "kernels": []}
    start = time.perf_counter()

    def add(task: pool.Task, result: dict[str, Any]) -> None:
        where = " ".join(filter(None, task))
        for key, row in result.get("kernels", {}).items():
            if "error" in row:
                report["failures"][f"{row['kernel']} of {where}"] = row["error"]
            elif key not in kernels:
                kernels[key] = {**row, "first_in": where}
        wrong = result.get("error") or result.get("refused")
        if wrong:
            report["failures"].setdefault(where, wrong)
            print(f"FAILED {where}: {wrong}", flush=True)
        report["done"] += 1
        report["kernels"] = sorted(kernels.values(), key=lambda row: -row["seconds"])
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["processor_seconds"] = round(sum(row["seconds"] for row in kernels.values()), 1)
        if given.out is not None:
            write_json(given.out, report)

    pool.run(work, todo, given.jobs, LIMIT_S, add)
    stacked = [row for row in kernels.values() if row.get("stack") or row.get("local")]
    print(
        f"{len(kernels)} kernels in {report['seconds']} s, {report['processor_seconds']} s one by "
        f"one; {len(stacked)} with a stack, {len(report['failures'])} failures"
    )
    # A kernel that only an alternative launches may fail.
    ours = [where for where in report["failures"] if "alternative" not in where]
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
