"""The drivers that stream tiles of the similarity matrix, shared by native and triton."""

from __future__ import annotations

from torch import Tensor

from . import logsumexp, sum
from .call import Call, Result
from .engine import Engine, SumTile

_DRIVERS = {"sum": sum, "logsumexp": logsumexp}


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    return _DRIVERS[call.spec.reduction].forward(call, engine, gradients)


def backward(
    call: Call, engine: Engine, state: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _DRIVERS[call.spec.reduction].backward(call, engine, state, weights)


__all__ = ["Call", "Engine", "Result", "SumTile", "backward", "forward"]
