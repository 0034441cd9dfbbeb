"""Targets (backend on device), and how a problem is evaluated on one."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import dispatch
from unitsface_kernels.backends import reference
from unitsface_kernels.backends.native import loader

ROOT = Path(__file__).resolve().parent.parent
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


def _rounded(t: Tensor, dtype: torch.dtype, truncate: bool) -> Tensor:
    """float32 values that ``dtype`` can hold; Triton's interpreter cuts bfloat16 off."""
    if truncate and dtype == torch.bfloat16:
        return (t.float().view(torch.int32) & -(2**16)).view(torch.float32)
    return t.to(dtype).float()


class _HalfProduct(torch.autograd.Function):
    """a @ b.T as tensor cores compute it: operands in half precision, sums in float32.

    The gradient that enters the backward products is rounded too, around its own magnitude as
    an operand of a float16 product has to be.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, dtype: torch.dtype, truncate: bool) -> Tensor:
        a, b = _rounded(a, dtype, truncate), _rounded(b, dtype, truncate)
        ctx.save_for_backward(a, b)
        ctx.rounding = dtype, truncate
        return a @ b.T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        a, b = ctx.saved_tensors
        top = gradient.abs().amax().clamp_min(1e-30) if gradient.numel() else 1.0
        gradient = _rounded(gradient / top, *ctx.rounding) * top
        return gradient @ b, gradient.T @ a, None, None


@contextmanager
def eager_precision(target: Target, dtype: torch.dtype):
    """The eager reference with the products that ``target`` is entitled to for ``dtype``.

    On the CPU the native backend multiplies in float32 whatever the inputs, but for bfloat16 on a
    processor that has instructions for it; the others may use tensor cores.
    """
    widened = target.backend == "native" and target.device == "cpu"
    if widened and dtype == torch.bfloat16:
        widened = not loader.extension().cpu.has_bf16_product()
    if dtype == torch.float32 or widened:
        yield
        return

    def cosines(rows: Tensor, columns: Tensor) -> Tensor:
        unit = [F.normalize(t, dim=1, eps=reference.NORM_EPS) for t in (rows, columns)]
        return _HalfProduct.apply(*unit, dtype, target.interpreted)

    with mock.patch.object(reference, "cosines", cosines):
        yield


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
    from unitsface_kernels.backends.native.cpu_engine import CpuEngine
    from unitsface_kernels.backends.native.cuda_engine import CudaEngine
    from unitsface_kernels.backends.triton.engine import TritonEngine

    for engine in (CpuEngine, CudaEngine, TritonEngine):
        monkeypatch.setattr(engine, "class_block", blocks)
        monkeypatch.setattr(engine, "sum_block", (blocks[0], blocks[0]))
