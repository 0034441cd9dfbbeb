"""``python -m bench.gpu_profile``: time of a GPU step by phase, against the roofline.

Two ceilings are measured first, on random data: the rate of a large bfloat16 GEMM, and the
bandwidth of a large copy (bytes read plus bytes written). A phase is a set of kernels, identified
by name in a profile; its FLOPs or bytes are counted from the shape, each input read once and each
output written once. Step times are medians of events without the profiler.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitsface_kernels import __version__, fused_margin_softmax_loss, fused_uss_loss

ELEMENT, FLOAT = 2, 4  # bytes of bfloat16 and of an accumulator
STEPS = 3
LIBRARY = re.compile(r"gemm|cutlass|nvjet|xmma|cublas", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """Rows against columns, bfloat16; ``columns`` 0: in-batch pairs, else classes."""

    name: str
    rows: int
    columns: int
    size: int = 512

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

    def inputs(self, device: str) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """Loss function without backend, and its arguments."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(count: int) -> Tensor:
            found = torch.randn(count, self.size, generator=generator, device=device)
            return found.bfloat16().requires_grad_()

        def labels(count: int) -> Tensor:
            return torch.randint(0, count, (self.rows,), generator=generator, device=device)

        if self.columns:
            inputs = {"feats": normal(self.rows), "weight": normal(self.columns)}
            return fused_margin_softmax_loss, inputs | {"labels": labels(self.columns)}
        b = torch.tensor(20.0, device=device, requires_grad=True)
        return fused_uss_loss, {
            "feats": normal(self.rows),
            "labels": labels(self.rows // 4),
            "b": b,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("pair-8k", 8192, 0),
        Shape("pair-32k", 32768, 0),
        Shape("class-100k", 512, 100_000),
        Shape("class-1m", 1024, 1_000_000),
    )
}


@dataclass(frozen=True)
class Phase:
    """Kernels of one purpose, and their FLOPs or bytes in a step."""

    name: str
    kernels: tuple[str, ...]
    flops: float = 0.0
    bytes: float = 0.0

    def has(self, kernel: str) -> bool:
        """Compares the name without namespace and template arguments; libraries by pattern."""
        if not self.kernels:
            return LIBRARY.search(kernel) is not None
        plain = re.sub(r"^void |<.*|\(.*", "", kernel).rpartition("::")[2]
        return plain in self.kernels


def phases(shape: Shape, backend: str) -> list[Phase]:
    """The phases of a step, first match wins; other kernels are "everything else"."""
    passes = 2.0 if shape.columns else 1.0  # a class loss normalizes in both of its passes
    normalize = passes * shape.elements * 2 * ELEMENT
    # Accumulators and raw rows are read; a batch's gradients are written in float32.
    written = ELEMENT if shape.columns else FLOAT
    jacobian = shape.elements * (FLOAT + ELEMENT + written)
    cosines = shape.gemm_flops if shape.columns else shape.gemm_flops / 2
    gradient_gemms = shape.gemm_flops * (2.0 if shape.columns else 1.0)
    found = [
        Phase("Jacobian of the norm", ("normalize_rows_backward_kernel",), bytes=jacobian),
        Phase("normalization", ("normalize_rows_kernel",), bytes=normalize),
    ]
    if backend == "triton":
        found += [
            Phase(
                "sum: cosines, policy, gradients", ("sum_kernel", "sum_total_kernel"), flops=cosines
            ),
            Phase("statistics: cosines, policy", ("statistics_kernel",), flops=cosines),
            Phase("gradients: cosines, policy", ("gradient_kernel",), flops=cosines),
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


def _seconds(run: Callable[[], object], at_least: float = 0.2) -> list[float]:
    """Event times, after a warm-up, of at least 5 runs and ``at_least`` seconds together."""
    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < at_least and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def ceilings() -> dict[str, float]:
    """Measured rates of a GEMM of 8192 x 8192 x 8192, and of a copy of 2 GB."""
    side, count = 8192, 1 << 30
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    gemm = statistics.median(_seconds(partial(torch.mm, a, b, out=out)))
    source = torch.randn(count, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = statistics.median(_seconds(partial(target.copy_, source)))
    return {"gemm_flops": 2.0 * side**3 / gemm, "copy_bytes": 2.0 * source.nbytes / copy}


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


def measure(shape: Shape, backend: str, rates: dict[str, float]) -> dict[str, Any]:
    """Time, roofline fraction, peak memory and breakdown of a step."""
    function, inputs = shape.inputs("cuda")
    leaves = [t for t in inputs.values() if t.requires_grad]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(**inputs, backend=backend).backward()

    times = _seconds(step)
    # Allocations that the first step leaves behind are not counted.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    roofline = shape.flops / rates["gemm_flops"]
    median = statistics.median(times)
    return {
        "shape": shape.name,
        "backend": backend,
        "median_s": median,
        "spread_s": [min(times), max(times)],
        "roofline_s": roofline,
        "roofline_fraction": roofline / median,
        "peak_bytes_above_inputs_and_gradients": peak,
        "phases": breakdown(kernel_seconds(step), shape, backend, **rates),
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
    rates = ceilings()
    results = {
        "command": " ".join(["python -m bench.gpu_profile", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "unitsface_kernels": __version__,
        **rates,
        "steps": [],
    }
    print(
        f"{results['device']}: bfloat16 GEMM {rates['gemm_flops'] / 1e12:.0f} TFLOP/s, "
        f"copies {rates['copy_bytes'] / 1e9:.0f} GB/s"
    )
    for name in options.shapes or SHAPES:
        for backend in options.backends:
            try:
                row = measure(SHAPES[name], backend, rates)
            except Exception as error:  # the other steps still run
                row = {
                    "shape": name,
                    "backend": backend,
                    "error": f"{type(error).__name__}: {error}",
                }
            print(table([row]), flush=True)
            results["steps"].append(row)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
            torch.cuda.empty_cache()
    return 1 if any("error" in row for row in results["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
