"""Targets (backend on device), and how a problem is evaluated on one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from unitsface_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "unitsface_kernels"


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    def runs(self, dtype: torch.dtype) -> bool:
        return dispatch.unavailable(self.backend, self.device, dtype) is None

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Whatever can run here is tested; test_build.py asserts what that has to be.
TARGETS = [
    Target(backend, device)
    for device in DEVICES
    for backend in dispatch.available(device, torch.float32)
]
FUSED = [target for target in TARGETS if target.backend != "reference"]


def run_python(*arguments: str, timeout: float = 120, **environment: str):
    """A fresh interpreter in the repository, with this process's environment and more."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def patched_blocks(monkeypatch, blocks: tuple[int, int]) -> None:
    """Tiles of ``blocks`` rows and columns for every engine: several in a small problem."""
    from unitsface_kernels.backends.eager import EagerEngine
    from unitsface_kernels.backends.native.cpu_engine import CpuEngine
    from unitsface_kernels.backends.native.cuda_engine import CudaEngine
    from unitsface_kernels.backends.triton.engine import TritonEngine

    for engine in (CpuEngine, CudaEngine, EagerEngine, TritonEngine):
        monkeypatch.setattr(engine, "class_block", blocks)
        monkeypatch.setattr(engine, "sum_block", (blocks[0], blocks[0]))
