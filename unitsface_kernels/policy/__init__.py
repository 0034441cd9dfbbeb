"""A language for losses: a formula of one pair, written once, becomes kernels for every backend.

::

    class Contrastive(policy.Pair):
        margin: policy.Number = 0.4
        def positive(self, c): return 1 - c
        def negative(self, c): return policy.maximum(c - self.margin, 0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .definition import (
    Class,
    Number,
    Pair,
    PerColumn,
    PerIdentity,
    PerRow,
    Policy,
    Scalar,
    Threshold,
    number,
)
from .expression import Expression, FormulaError
from .vocabulary import (
    abs,
    acos,
    clamp,
    cos,
    cosine_margin,
    detach,
    exp,
    log,
    maximum,
    minimum,
    pow,
    sigmoid,
    sin,
    sine,
    softplus,
    sqrt,
    square,
    tanh,
    where,
)

if TYPE_CHECKING:
    from ..losses.spec import LossSpec


def spec(policy: Policy) -> LossSpec:
    """The loss of a policy as the drivers use it; equal formulas are one loss."""
    # Losses are made of policies.
    from ..losses import custom

    return custom.spec(policy)


__all__ = [
    "Class",
    "Expression",
    "FormulaError",
    "Number",
    "Pair",
    "PerColumn",
    "PerIdentity",
    "PerRow",
    "Policy",
    "Scalar",
    "Threshold",
    "abs",
    "acos",
    "check",
    "clamp",
    "cos",
    "cosine_margin",
    "detach",
    "exp",
    "log",
    "maximum",
    "minimum",
    "number",
    "pow",
    "sigmoid",
    "sin",
    "sine",
    "softplus",
    "spec",
    "sqrt",
    "square",
    "tanh",
    "where",
]


def __getattr__(name: str) -> Any:
    """``check`` needs the whole package, which needs this one."""
    if name == "check":
        from .checking import check

        return check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
