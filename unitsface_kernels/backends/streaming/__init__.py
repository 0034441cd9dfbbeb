"""The drivers that stream tiles of the similarity matrix, shared by native and triton."""

from __future__ import annotations

from torch import Tensor

from . import logsumexp, sum
from .call import Call, Gradients, Result
from .engine import Engine, SumTile

_DRIVERS = {"sum": sum, "logsumexp": logsumexp}


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    return _DRIVERS[call.spec.reduction].forward(call, engine, gradients)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    return _DRIVERS[call.spec.reduction].backward(call, engine, state, weights)


__all__ = ["Call", "Engine", "Gradients", "Result", "SumTile", "backward", "forward"]
