"""The compiled extension: library matrix products on cache-sized tiles, our epilogues on them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import streaming
from ..histogram import ScoreEngine
from ..streaming import Call, Engine, Gradients, Result
from . import loader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such tensors; None if it can."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"it has no kernels for device type {device.type!r}"
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    return loader.failure() if device.type == "cpu" else loader.device_failure(device)


def _engine(call: Call) -> Engine:
    if call.rows.is_cuda:
        from .cuda_engine import CudaEngine

        return CudaEngine(call)
    from .cpu_engine import CpuEngine

    return CpuEngine(call)


def score_engine(device: torch.device) -> ScoreEngine:
    """Products and histograms of scores, in float32 whatever the features' dtype."""
    if device.type == "cuda":
        from .cuda_engine import CudaEngine

        return CudaEngine(None, device)
    from .cpu_engine import CpuEngine

    return CpuEngine(None, device)


def forward(call: Call, gradients: bool) -> Result:
    return streaming.forward(call, _engine(call), gradients)


def backward(call: Call, state: Tensor, weights: Tensor) -> Gradients:
    return streaming.backward(call, _engine(call), state, weights)
