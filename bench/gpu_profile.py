"""``python -m bench.gpu_profile``: time of a GPU step by phase, against the roofline.

Two ceilings are measured first, on random data: the rate of a large bfloat16 GEMM, and the
bandwidth of a large copy (bytes read plus bytes written). A phase is a set of kernels, identified
by name in a profile; its FLOPs or bytes are counted from the shape, each input read once and each
output written once. Step times are medians of events without the profiler.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unitsface_kernels import __version__

from .gpu_check import pool, rates, steps, timing
from .gpu_check.files import write_json
from .workloads import WORKLOADS

ELEMENT, FLOAT = 2, 4  # bytes of bfloat16 and of an accumulator
STEPS = 3
#: Limit of one step, its process included.
LIMIT_S = 40.0
LIBRARY = re.compile(r"gemm|cutlass|nvjet|xmma|cublas", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """Rows against columns; ``columns`` 0: in-batch pairs, else classes.

    Attributes:
        optimized: the optimizer's step on float32 weights is part of the backward pass.
    """

    name: str
    rows: int
    columns: int
    size: int = 512
    optimized: bool = False

    @property
    def gemm_flops(self) -> float:
        """FLOPs of one GEMM of all rows with all columns."""
        return 2.0 * self.rows * (self.columns or self.rows) * self.size

    @property
    def cells(self) -> float:
        """Cosines of one pass; in-batch, each pair once."""
        return self.rows * self.columns if self.columns else self.rows * self.rows / 2

    @property
    def elements(self) -> float:
        """Elements of rows and columns."""
        return float((self.rows + self.columns) * self.size)

    @property
    def flops(self) -> float:
        """FLOPs of a step: 0.5 + 1 GEMMs in-batch, two passes of 2 GEMMs for classes."""
        return self.gemm_flops * (4.0 if self.columns else 1.5)


_HEAD = steps.PARTIAL_FC
SHAPES = {
    shape.name: shape
    for shape in (
        *(
            Shape(name, WORKLOADS[name].rows, WORKLOADS[name].columns)
            for name in ("pair-8k", "pair-32k", "class-100k", "class-1m")
        ),
        Shape(_HEAD.name, _HEAD.rows, int(_HEAD.sample_rate * _HEAD.classes), optimized=True),
    )
}


@dataclass(frozen=True)
class Phase:
    """Kernels of one purpose, as patterns of names, and their FLOPs or bytes in a step."""

    name: str
    kernels: tuple[str, ...]
    flops: float = 0.0
    bytes: float = 0.0

    def has(self, kernel: str) -> bool:
        """Matches the name without namespace and template arguments; no patterns: a library's."""
        if not self.kernels:
            return LIBRARY.search(kernel) is not None
        plain = re.sub(r"^void |<.*|\(.*", "", kernel).rpartition("::")[2]
        return any(re.fullmatch(pattern, plain) for pattern in self.kernels)


def phases(shape: Shape, backend: str) -> list[Phase]:
    """The phases of a step, first match wins; other kernels are "everything else"."""
    passes = 2.0 if shape.columns else 1.0  # a class loss normalizes in both of its passes
    raw = FLOAT if shape.optimized else ELEMENT
    normalize = passes * shape.elements * (raw + ELEMENT)
    # Accumulators and raw rows are read; a batch's gradients are written in float32.
    written = ELEMENT if shape.columns and not shape.optimized else FLOAT
    jacobian = shape.elements * (FLOAT + raw + written)
    # Weights and momentum are read and written, the gradient is read.
    update = shape.columns * shape.size * 5 * FLOAT if shape.optimized else 0.0
    cosines = shape.gemm_flops if shape.columns else shape.gemm_flops / 2
    gradient_gemms = shape.gemm_flops * (2.0 if shape.columns else 1.0)
    found = [
        Phase("Jacobian of the norm", (r"normalize\w*_backward\w*_kernel",), bytes=jacobian),
        Phase("normalization", (r"normalize\w*_kernel",), bytes=normalize),
        Phase("optimizer", (r"update_rows\w*_kernel",), bytes=update),
    ]
    if backend == "triton":
        found += [
            Phase("sum: cosines, policy, gradients", (r"sum\w*_kernel",), flops=cosines),
            Phase("statistics: cosines, policy", (r"\w*statistics\w*_kernel",), flops=cosines),
            Phase("gradients: cosines, policy", (r"\w*gradient\w*_kernel",), flops=cosines),
            Phase("GEMMs of gradients", (), flops=gradient_gemms),
        ]
    else:
        both = shape.cells * (FLOAT + ELEMENT)
        found += [
            Phase("sum: policy, gradients", ("sum_tile_kernel",), bytes=both),
            Phase("statistics: policy", ("logsumexp_tile_kernel",), bytes=shape.cells * FLOAT),
            Phase("gradients: policy", ("logsumexp_gradient_kernel",), bytes=both),
            Phase("all GEMMs", (), flops=shape.flops),
        ]
    return found


def breakdown(
    times: dict[str, float], shape: Shape, backend: str, gemm_flops: float, copy_bytes: float
) -> list[dict[str, Any]]:
    """Seconds, fraction of the step and fraction of a ceiling per phase.

    Args:
        times: seconds of one step by kernel name.
        shape, backend: of the step.
        gemm_flops, copy_bytes: the ceilings, per second.
    """
    left = dict(times)
    total = sum(times.values())
    rows = []
    for phase in phases(shape, backend):
        mine = [name for name in left if phase.has(name)]
        seconds = sum(left.pop(name) for name in mine)
        if not seconds:
            continue
        row = {"phase": phase.name, "seconds": seconds, "fraction": seconds / total}
        if phase.flops:
            row["tflops"] = phase.flops / seconds / 1e12
            row["of_gemm"] = phase.flops / seconds / gemm_flops
        else:
            row["gb_per_s"] = phase.bytes / seconds / 1e9
            row["of_copy"] = phase.bytes / seconds / copy_bytes
        rows.append(row)
    rest = sum(left.values())
    largest = sorted(left, key=lambda name: -left[name])[:3]
    rows.append(
        {
            "phase": "everything else",
            "seconds": rest,
            "fraction": rest / total if total else 0.0,
            "largest": {name[:100]: left[name] for name in largest},
        }
    )
    return rows


def kernel_seconds(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one step by kernel name, the mean of ``STEPS``."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds = event.self_device_time_total / 1e6 / STEPS
            found[event.key] = found.get(event.key, 0.0) + seconds
    return found


def measure(name: str, backend: str, gemm_flops: float, copy_bytes: float) -> dict[str, Any]:
    """Time, roofline fraction, peak memory and breakdown of a step."""
    shape = SHAPES[name]
    one = steps.make(name, backend)
    times = timing.seconds(one.run)
    # Allocations that the first step leaves behind are not counted.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.run()
    peak = torch.cuda.max_memory_allocated() - before
    roofline = shape.flops / gemm_flops
    median = statistics.median(times)
    kernels = kernel_seconds(one.run)
    return {
        "median_s": median,
        "spread_s": [min(times), max(times)],
        "busy_s": sum(kernels.values()),
        "roofline_s": roofline,
        "roofline_fraction": roofline / median,
        "peak_bytes_above_inputs_and_gradients": peak,
        "phases": breakdown(kernels, shape, backend, gemm_flops, copy_bytes),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line per step, one per phase below it."""
    lines = []
    for row in results:
        name = f"{row['shape']} {row['backend']}"
        if "error" in row:
            lines.append(f"{name:24} failed: {row['error']}")
            continue
        lines.append(
            f"{name:24} {1e3 * row['median_s']:9.3f} ms, "
            f"{100 * row['roofline_fraction']:5.1f} % of the roofline"
        )
        for phase in row["phases"]:
            ceiling = ""
            if "of_gemm" in phase:
                ceiling = f"{phase['tflops']:7.1f} TFLOP/s, {100 * phase['of_gemm']:5.1f} % of GEMM"
            elif "of_copy" in phase:
                ceiling = (
                    f"{phase['gb_per_s']:7.0f} GB/s,    {100 * phase['of_copy']:5.1f} % of copy"
                )
            milliseconds = 1e3 * phase["seconds"]
            percent = 100 * phase["fraction"]
            lines.append(f"  {phase['phase']:34}{milliseconds:9.3f} ms {percent:5.1f} %  {ceiling}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_profile", description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"default: all of {', '.join(SHAPES)}")
    parser.add_argument("--backends", nargs="+", default=["triton", "native"])
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    unknown = set(options.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"unknown shape {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    ceilings = rates.ceilings()
    results: dict[str, Any] = {
        "command": " ".join(["python -m bench.gpu_profile", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "unitsface_kernels": __version__,
        **ceilings,
        "steps": [],
    }
    print(
        f"{results['device']}: bfloat16 GEMM {ceilings['gemm_flops'] / 1e12:.0f} TFLOP/s, "
        f"copies {ceilings['copy_bytes'] / 1e9:.0f} GB/s"
    )
    # The ceilings' matrices would be missing from the memory of the steps' processes.
    torch.cuda.empty_cache()

    def add(task: pool.Task, result: dict[str, Any]) -> None:
        row = {"shape": task[0], "backend": task[1], **result}
        print(table([row]), flush=True)
        results["steps"].append(row)
        if options.out is not None:
            write_json(options.out, results)

    tasks = [
        (name, backend, *ceilings.values())
        for name in options.shapes or SHAPES
        for backend in options.backends
    ]
    # One at a time: they are timed. In processes of their own: one may lose the device.
    pool.run(measure, tasks, jobs=1, limit=LIMIT_S, report=add)
    return 1 if any("error" in row for row in results["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
