"""The drivers that stream tiles of the similarity matrix, shared by native and triton."""

from __future__ import annotations

from torch import Tensor

from ...losses import LossSpec
from . import logsumexp, nearest, sum
from .call import Call, Gradients, Result
from .engine import Engine, SumTile

_DRIVERS = {"sum": sum, "logsumexp": logsumexp, "nearest": nearest}


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Rows of the (rows, N) float32 state that a loss keeps for its backward pass."""
    return _DRIVERS[spec.reduction].state_rows(spec, params)


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    return _DRIVERS[call.spec.reduction].forward(call, engine, gradients)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    return _DRIVERS[call.spec.reduction].backward(call, engine, state, weights)


__all__ = [
    "Call",
    "Engine",
    "Gradients",
    "Result",
    "SumTile",
    "backward",
    "forward",
    "state_rows",
]
