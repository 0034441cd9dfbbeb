"""The compiled extension: library GEMMs on cache-sized tiles, and epilogues of its own on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ...losses import CUSTOM
from ..histogram import ScoreEngine
from ..streaming import Call, Engine
from . import loader
from .cpu_engine import CpuEngine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such tensors; None if it can."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"it has no kernels for device type {device.type!r}"
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    return loader.failure() if device.type == "cpu" else loader.device_failure(device)


_NOTHING = nullcontext()


def context(call: Call) -> AbstractContextManager[object]:
    """An empty context: kernels get their device, and matmuls write float32, autocast or not.

    A loss that may lack kernels needs operations of Torch that autocast would round to its dtype.
    """
    device = call.rows.device.type
    if _may_lack_kernels(call) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def make_engine(call: Call, stage: str, gradients: bool, run: Callable[[Engine], object]) -> Engine:
    """The engine of a pass; see ``passes.py`` for the arguments."""
    reason = no_kernels(call) if _may_lack_kernels(call) else None
    if reason is not None:
        from .. import eager

        eager.warn(call.spec.name, reason)
        return eager.EagerEngine(call)
    if call.rows.is_cuda:
        from . import fused

        return fused.engine_class(call.rows.device)(call)
    return CpuEngine(call)


def _may_lack_kernels(call: Call) -> bool:
    """Losses of users, and on CUDA those whose tiles read variables."""
    variables = call.rows.is_cuda and any(v.streamed for v in call.spec.variables)
    return variables or call.spec.name in CUSTOM


def no_kernels(call: Call) -> str | None:
    """Why there are no kernels of such a loss; None if there are."""
    if call.spec.tiles is not None:
        return None
    from . import custom

    if call.rows.is_cuda and call.spec.reduction != "nearest":
        if call.spec.name in CUSTOM:
            return "only CPU kernels are compiled at run time; on CUDA tensors, use Triton"
        return "CUDA kernels read no variables in every pair; use Triton"
    return custom.failure(call.spec, loader.extension())


def score_engine(device: torch.device) -> ScoreEngine:
    """Matmuls and histograms of scores, in float32 whatever the features' dtype."""
    if device.type == "cuda":
        from .cuda_engine import CudaEngine

        return CudaEngine(None, device)
    return CpuEngine(None, device)
