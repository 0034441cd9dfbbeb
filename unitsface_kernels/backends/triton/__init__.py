"""Triton backend: GEMM, policy and reduction fused in one kernel per tile.

Importing this module needs neither triton nor a GPU; what is missing is what
:func:`unavailable` answers.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import streaming

if TYPE_CHECKING:
    from ..streaming import Call, Result
    from ..streaming.call import Gradients
    from .configs import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)
MINIMUM_TRITON = (3, 4)


@cache
def _broken() -> str | None:
    """Why the kernels cannot be imported; None if they can."""
    try:
        triton = importlib.import_module("triton")
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < MINIMUM_TRITON:
            need = ".".join(map(str, MINIMUM_TRITON))
            return f"it needs Triton {need}, found {triton.__version__}"
        importlib.import_module(".engine", __name__)
    except Exception as error:  # whatever a broken installation raises
        return f"triton cannot be used: {type(error).__name__}: {error}"
    return None


def unavailable(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such tensors; None if it can."""
    device = torch.device(device)
    reason = _broken()
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"it computes in {names} only"
    from . import launch

    if device.type == "cpu":
        if launch.INTERPRETED:
            return None
        return "Triton runs CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return "it runs on CUDA devices only"
    if not torch.cuda.is_available():
        return "no usable CUDA device"
    if launch.INTERPRETED:
        return "TRITON_INTERPRET=1 leaves it to CPU tensors"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        need, have = (".".join(map(str, c)) for c in (MINIMUM_CAPABILITY, capability))
        return f"it needs compute capability {need}, this device has {have}"
    return None


def _context(call: Call) -> ExitStack:
    """Kernels launch on the tensors' device; autocast must not touch the library GEMMs."""
    stack = ExitStack()
    device = call.rows.device
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack


def forward(call: Call, gradients: bool) -> Result:
    """Loss, state and, with ``gradients``, the gradients for an upstream gradient of one."""
    from . import autotune
    from .engine import TritonEngine

    known = gradients and call.need_any and call.spec.reduction == "sum"
    # What a first pass finds out about its tiles is of use if those of the second are the same.
    tiles = known or (call.skips and call.need_any)

    def run(config: Config) -> Result:
        return streaming.forward(call, TritonEngine(call, tiles, config=config), gradients)

    with _context(call):
        # Losses alone are another kernel than the one that is searched for.
        search = (known or call.spec.reduction != "sum") and _repeatable(call)
        return run(autotune.config(call, "forward", run, search))


def backward(call: Call, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients of rows, columns and threshold for the rows' upstream gradients ``weights``."""
    from . import autotune
    from .engine import TritonEngine

    def run(config: Config) -> Gradients:
        return streaming.backward(call, TritonEngine(call, config=config), state, weights)

    with _context(call):
        return run(autotune.config(call, "backward", run, _repeatable(call)))


def _repeatable(call: Call) -> bool:
    """Whether a search may run it several times: without a word to other ranks, or a step."""
    return call.ranks is None and call.shards is None and call.sink is None
