"""Interleaved timing, peak memory in a process of its own, and the machine's own GEMM rate."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from unitsface_kernels import __version__

from .workloads import WORKLOADS, Workload, step

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, object]:
    """What a figure has to be read with."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "unitsface_kernels": __version__,
        "matrix_library": "MKL" if torch.backends.mkl.is_available() else "other",
    }


def gemm_seconds(size: int, flops: float) -> float:
    """Time of one (1024, size) x (size, 1024) product, scaled to ``flops``."""
    a, out = torch.randn(1024, size), torch.empty(1024, 1024)
    repeats = 8
    torch.mm(a, a.T, out=out)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, a.T, out=out)
    return (time.perf_counter() - start) / repeats * flops / (2.0 * 1024 * 1024 * size)


def check(workload: Workload, loss, inputs, oracle: float) -> float:
    """Relative error of a contestant's loss against float64; raises if it is not the same work."""
    error = abs(float(step(loss, inputs).detach()) - oracle) / abs(oracle)
    if not error < 1e-4:
        raise AssertionError(f"{workload.name}: a contestant's loss is off by {error:.1e}")
    return error


def oracle(workload: Workload, inputs) -> float:
    """The eager loss in float64, in blocks of rows for the class losses."""
    eager = workload.contestants()["eager"]
    with torch.no_grad():
        if not workload.columns:
            wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            return float(eager(**wide))
        weight = inputs["weight"].double()
        blocks = [
            eager(feats=f.double(), weight=weight, labels=y) * len(y)
            for f, y in zip(inputs["feats"].split(64), inputs["labels"].split(64), strict=True)
        ]
        return float(torch.stack(blocks).sum() / workload.rows)


def time_interleaved(workload: Workload, seconds: float, names: list[str]) -> dict[str, object]:
    """Rounds of one step of every contestant and one GEMM, until ``seconds`` have passed."""
    inputs = workload.inputs()
    truth = oracle(workload, inputs)
    contestants = {n: c for n, c in workload.contestants().items() if n in names}
    errors = {name: check(workload, loss, inputs, truth) for name, loss in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    limits: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(limits) < 5:
        limits.append(gemm_seconds(workload.size, workload.flops))
        for name, loss in contestants.items():
            start = time.perf_counter()
            step(loss, inputs)
            times[name].append(time.perf_counter() - start)
    rows = {}
    for name, samples in times.items():
        ratios = [a / b for a, b in zip(samples, times["native"], strict=True)]
        rows[name] = {
            "median_s": statistics.median(samples),
            "spread_s": [min(samples), max(samples)],
            "times_native": statistics.median(ratios),
            "times_native_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "loss_error": errors[name],
        }
    bound = statistics.median(
        limit / ours for limit, ours in zip(limits, times["native"], strict=True)
    )
    return {"rounds": len(limits), "contestants": rows, "fraction_of_gemm_bound": bound}


def peak_memory(workload: Workload, name: str) -> dict[str, float]:
    """MB above inputs and gradients at the peak of a step, in a process of its own."""
    code = (
        f"from bench.harness import _measure_memory; _measure_memory({workload.name!r}, {name!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"memory of {name} on {workload.name} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _measure_memory(workload_name: str, name: str) -> None:
    workload = WORKLOADS[workload_name]
    warm = Workload("warm", workload.loss, 64, 64 if workload.columns else 0, workload.size, 1.0)
    step(warm.contestants()[name], warm.inputs())  # libraries, thread pools, compiled code
    inputs, loss = workload.inputs(), workload.contestants()[name]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kb("VmRSS")
    step(loss, inputs)
    peak = _status_kb("VmHWM") - before
    gradients = sum(t.grad.nbytes for t in inputs.values() if t.grad is not None) / 1024
    print(json.dumps({"peak_mb": peak / 1024, "above_gradients_mb": (peak - gradients) / 1024}))
