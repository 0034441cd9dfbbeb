"""``python -m bench.gpu_check.environment``: versions, tools and the device, as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .files import write_json

PACKAGES = (
    *("torch", "triton", "numpy", "pytest", "setuptools", "cmake", "ninja"),
    *("hypothesis", "pytest-xdist", "pytest-benchmark", "pytorch-metric-learning"),
    *("liger-kernel", "cut-cross-entropy", "inf-cl", "quack-kernels", "siglip-kernel"),
)
TOOLS = ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer", "cuobjdump", "c++")
#: Properties of the device, where this Torch has them.
PROPERTIES = (
    *("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size"),
    *("shared_memory_per_multiprocessor", "shared_memory_per_block_optin"),
    *("regs_per_multiprocessor", "max_threads_per_multi_processor", "clock_rate"),
)
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version"


def packages() -> dict[str, str | None]:
    """Versions; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def clocks() -> dict[str, str]:
    """Clocks in MHz and the driver's version as the driver reports them now; else nothing."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.partition("\n")[0].split(",")
    return dict(zip(CLOCKS.split(","), (value.strip() for value in values), strict=False))


def device() -> dict[str, Any]:
    """Properties of the first device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("Torch finds no CUDA device")
    found = torch.cuda.get_device_properties(0)
    known = {name: getattr(found, name) for name in PROPERTIES if hasattr(found, name)}
    known["memory_free"] = torch.cuda.mem_get_info()[0]
    return known | {"cuda": torch.version.cuda, "count": torch.cuda.device_count()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.environment")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    out = parser.parse_args(arguments).out
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "packages": packages(),
        "tools": {name: shutil.which(name) for name in TOOLS},
        "clocks": clocks(),
    }
    write_json(out, report)
    report["device"] = device()
    write_json(out, report)
    for name, value in report.items():
        print(name, value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
