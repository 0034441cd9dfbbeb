"""Triton backend: matmul, policy and reduction fused in one kernel per tile.

Importing this module needs neither triton nor a GPU; :func:`unavailable` returns what is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..streaming import Call, Engine
    from .autotune import Stage
    from .configs import Config
    from .engine import TritonEngine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)
MINIMUM_TRITON = (3, 4)


#: Devices that can run the kernels, which does not change.
_usable: set[torch.device] = set()


@cache
def _modules() -> tuple[ModuleType, ModuleType, type[TritonEngine]]:
    """What needs Triton: an import statement in a function takes longer than the look-up here."""
    from . import autotune, launch
    from .engine import TritonEngine

    return autotune, launch, TritonEngine


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
    if device in _usable:
        return None
    _, launch, _ = _modules()
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
    if device.index is not None:
        _usable.add(device)
    return None


def context(call: Call) -> AbstractContextManager[object]:
    """Kernels launch on the tensors' device; autocast must not touch the library's matmuls."""
    device = call.rows.device
    guard = torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()
    if not torch.is_autocast_enabled(device.type):
        return guard
    stack = ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(guard)
    return stack


def make_engine(
    call: Call, stage: Stage, gradients: bool, run: Callable[[Engine], object]
) -> Engine:
    """The engine of a pass, with the tile sizes found for it; see ``passes.py``."""
    autotune, _, engine = _modules()
    in_forward = gradients and call.need_any and call.spec.reduction == "sum"
    yields = stage == "backward" or in_forward
    # What a first pass finds out about its tiles is of use if those of the second are the same.
    tiles = yields or (call.filters and call.need_any)

    def trial(config: Config) -> object:
        return run(engine(call, tiles, config=config))

    # Losses alone are another kernel than the one that is searched for.
    search = (yields or call.spec.reduction != "sum") and _repeatable(call)
    # With several centers most of the time is that of a kernel without a choice.
    search = search and call.centers == 1
    return engine(call, tiles, config=autotune.config(call, stage, trial, search))


def _repeatable(call: Call) -> bool:
    """Whether a search may run it several times: without messages to other ranks, or a step."""
    return call.ranks is None and call.shards is None and call.sink is None
