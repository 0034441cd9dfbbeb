"""The machine: names, versions, memory, and the rates of its roofline."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from unitsface_kernels import __version__

# Packages of the implementations.
PACKAGES = (
    "triton",
    "numpy",
    "pytorch-metric-learning",
    "liger-kernel",
    "cut-cross-entropy",
    "inf-cl",
    "quack-kernels",
    "siglip-kernel",
)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, object]:
    """Facts that are stored with every measurement."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "unitsface_kernels": __version__,
        "matrix_library": "MKL" if torch.backends.mkl.is_available() else "other",
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def has_bfloat16_gemm() -> bool:
    """True if the CPU multiplies bfloat16 matrices faster than float32 ones."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def reset_peak() -> None:
    """Sets the process's high-water mark to its present memory.

    Freed blocks are returned first: blocks cached by the C library would not be counted.
    """
    # Only glibc has it, and only glibc caches that much.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def held_mb(device: str, reset: bool = False) -> float:
    """MB at the high-water mark or, if the mark is to be reset, now."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        reset_peak()
    return status_kb("VmRSS" if reset else "VmHWM") / 1024


def available_bytes(device: str) -> float:
    if device == "cuda":
        # Torch's cached blocks are free to it.
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    # A container may have less than its machine.
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(limit.read_text()) - used)
    return float(free)


def _seconds(device: str, work, repeats: int) -> float:
    work()
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def gemm_rate(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of an (n, size) x (size, n) GEMM large enough for the device."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, size, device=device).to(dtype)
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2.0 * n * n * size / _seconds(device, lambda: torch.mm(a, a.T, out=out), 8)


def gemm_seconds(size: int, flops: float) -> float:
    """Seconds of ``flops`` FLOPs at the CPU's float32 GEMM rate."""
    return flops / gemm_rate(size)


def copy_rate(device: str = "cpu") -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    count = (1 << 30 if device == "cuda" else 1 << 27) // 4
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    return 2.0 * source.nbytes / _seconds(device, lambda: target.copy_(source), 4)
