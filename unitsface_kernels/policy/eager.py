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
    """Values of several expressions; what they share is computed once."""
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
    if len(args) == 2:
        x, y = args
        if isinstance(y, float) and e.op in _NUMBER_LAST:
            return _NUMBER_LAST[e.op](x, y)
        if isinstance(x, float) and e.op in _NUMBER_FIRST:
            return _NUMBER_FIRST[e.op](y, x)
    return operation.eager(*(_tensor(arg, dtype) for arg in args))


#: Operations on a tensor and a number, the last or the first operand: the value and the derivative
#: of the eager meaning, without a tensor of the number.
_NUMBER_LAST: dict[str, Callable[..., Tensor]] = {
    "max": torch.clamp_min,
    "min": torch.clamp_max,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
}
_NUMBER_FIRST: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.rsub,
    "mul": torch.mul,
    "lt": torch.gt,
    "le": torch.ge,
    "eq": torch.eq,
}


def _tensor(value: Value, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # On the CPU: a tensor without dimensions meets those of any device.
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else dtype)
