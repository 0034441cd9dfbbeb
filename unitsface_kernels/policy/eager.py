"""Expressions as operations of Torch on tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .expression import Expression, topological, value_of
from .operations import OPERATIONS

Value = Tensor | float | bool


def evaluate(expression: Expression, bindings: Mapping[Expression, Tensor | float]) -> Tensor:
    """The value of ``expression`` where its leaves are ``bindings``, which broadcast.

    Differentiable. What depends on numbers of Python alone is computed in float64, and meets
    tensors in their dtype.
    """
    return evaluate_all([expression], bindings)[0]


def evaluate_all(
    expressions: Sequence[Expression], bindings: Mapping[Expression, Tensor | float]
) -> list[Tensor]:
    """The same for several, with what they share computed once."""
    like = next((value for value in bindings.values() if value_is_number(value)), None)
    dtype = like.dtype if isinstance(like, Tensor) else torch.float64
    nodes = topological(*expressions, above=bindings)
    uses = Counter(arg for e in nodes if e not in bindings for arg in e.args)
    uses.update(expressions)
    values: dict[Expression, Value] = {}
    for e in nodes:
        values[e] = _value(e, bindings, values, dtype)
        for arg in () if e in bindings else e.args:
            uses[arg] -= 1
            if not uses[arg]:
                # Tiles are large.
                del values[arg]
    return [_tensor(values[e], dtype) for e in expressions]


def value_is_number(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.dtype != torch.bool


def _value(
    e: Expression,
    bindings: Mapping[Expression, Tensor | float],
    values: Mapping[Expression, Value],
    dtype: torch.dtype,
) -> Value:
    if e in bindings:
        value: Any = bindings[e]
        # A symbol of torch.compile: Python arithmetic on it would become a guard on the result.
        symbolic = isinstance(value, torch.SymFloat)
        return torch.full((), value, dtype=torch.float64) if symbolic else value
    if e.op == "const":
        return bool(e.payload) if e.mask else value_of(e)
    operation = OPERATIONS[e.op]
    args = [values[arg] for arg in e.args]
    if not any(isinstance(arg, Tensor) for arg in args):
        return operation.host(*args)
    bounded = _BOUNDED.get(e.op)
    if bounded is not None and isinstance(args[1], float) and isinstance(args[0], Tensor):
        return bounded(args[0], args[1])
    return operation.eager(*(_tensor(arg, dtype) for arg in args))


#: Extremes of a tensor and a number: one operation, with the derivative of the eager meaning.
_BOUNDED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "max": torch.clamp_min,
    "min": torch.clamp_max,
}


def _tensor(value: Value, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # On the CPU: a tensor without dimensions meets those of any device.
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else dtype)
