"""The drivers that stream tiles of the similarity matrix, shared by native and triton."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ...losses import LossSpec
from ..dense import dense
from . import logsumexp, logsumexp_pairs, nearest, sum
from .call import Call, ColumnSink, Gradients, Kept, Result, make_call
from .engine import (
    ClassSums,
    ClassTile,
    ClassWeights,
    Engine,
    Nearest,
    NegativeSums,
    PairTile,
    PairWeights,
    PositiveSums,
    SumTile,
)
from .shards import Shards

_DRIVERS = {
    ("sum", "pair"): sum,
    ("sum", "class"): sum,
    ("logsumexp", "pair"): logsumexp_pairs,
    ("logsumexp", "class"): logsumexp,
    ("nearest", "class"): nearest,
}


def _driver(spec: LossSpec) -> ModuleType:
    return _DRIVERS[spec.reduction, spec.topology]


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Rows of the (rows, N) float32 state that a loss keeps for its backward pass."""
    return _driver(spec).state_rows(spec, params)


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    return _driver(call.spec).forward(call, engine, gradients)


def backward(call: Call, engine: Engine, state: Tensor | None, weights: Tensor) -> Gradients:
    state = None if state is None else dense(state)
    return _driver(call.spec).backward(call, engine, state, dense(weights))


__all__ = [
    "Call",
    "ClassSums",
    "ClassTile",
    "ClassWeights",
    "ColumnSink",
    "Engine",
    "Gradients",
    "Kept",
    "Nearest",
    "NegativeSums",
    "PairTile",
    "PairWeights",
    "PositiveSums",
    "Result",
    "Shards",
    "SumTile",
    "backward",
    "forward",
    "make_call",
    "state_rows",
]
