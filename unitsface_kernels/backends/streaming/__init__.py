"""The drivers that stream tiles of the similarity matrix, shared by native and triton."""

from __future__ import annotations

from types import ModuleType

from ...losses import LossSpec
from . import logsumexp, logsumexp_pairs, logsumexps, nearest, nearest_pairs, sum
from .call import (
    Call,
    CallConfig,
    CallTensors,
    Gradients,
    Result,
    ShardPart,
    make_call,
)
from .centers import CenterTiles
from .engine import (
    ClassTile,
    ClassWeights,
    Engine,
    Nearest,
    NegativeSums,
    PairSums,
    PairTile,
    PairWeights,
    PositiveSums,
    SumTile,
    TileColumns,
)
from .engine_parts import BothProducts, UnitRows
from .forward_cache import ForwardCache
from .logsumexp import finish_rows
from .mixing import Changes, Mixing
from .other_ranks import Blocks, Towers
from .reductions import ClassSums, Reductions, RowFactors
from .row_formulas import row_slopes
from .selection import DeviceFilter, RowSelection, SortedTargets
from .shards import Shards
from .sink import ColumnSink, RowStep
from .values import TargetWeights, TileVariables, Variables

_DRIVERS = {
    ("sum", "pair"): sum,
    ("sum", "class"): sum,
    ("logsumexp", "pair"): logsumexp_pairs,
    ("logsumexp", "class"): logsumexp,
    ("logsumexps", "pair"): logsumexps,
    ("nearest", "class"): nearest,
    ("nearest", "pair"): nearest_pairs,
}


def driver(spec: LossSpec) -> ModuleType:
    """Functions ``forward(call, engine, gradients)`` and ``backward(call, engine, state, weights)``
    of a loss.
    """
    return _DRIVERS[spec.reduction, spec.topology]


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Rows of the (rows, N) float32 state that a loss keeps for its backward pass."""
    return driver(spec).state_rows(spec, params)


__all__ = [
    "Blocks",
    "BothProducts",
    "Call",
    "CallConfig",
    "CallTensors",
    "CenterTiles",
    "Changes",
    "ClassSums",
    "ClassTile",
    "ClassWeights",
    "ColumnSink",
    "DeviceFilter",
    "Engine",
    "ForwardCache",
    "Gradients",
    "Mixing",
    "Nearest",
    "NegativeSums",
    "PairSums",
    "PairTile",
    "PairWeights",
    "PositiveSums",
    "Reductions",
    "Result",
    "RowFactors",
    "RowSelection",
    "RowStep",
    "ShardPart",
    "Shards",
    "SortedTargets",
    "SumTile",
    "TargetWeights",
    "TileColumns",
    "TileVariables",
    "Towers",
    "UnitRows",
    "Variables",
    "driver",
    "finish_rows",
    "make_call",
    "row_slopes",
    "state_rows",
]
