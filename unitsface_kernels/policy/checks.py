"""What is checked of a formula when its class is defined."""

from __future__ import annotations

import difflib
import inspect
import math
from functools import cache

import torch
from torch import Tensor

from .derive import derivative
from .expression import Expression, Line, Lines, fail, topological, value_of
from .formula import COSINE, Formula, default_params
from .operations import OPERATIONS
from .variable import TARGET_COSINE

#: Thresholds and targets' cosines at which formulas have to be finite, and other variables.
_OTHERS = (0.0, 0.5, 1.0, -1.0, 10.0)
_VARIABLES = (0.25, 0.5, 1.0, 2.0, 10.0)


#: Inner products are up to this.
_LARGE = 1e4


@cache
def _cosines(normalize: bool) -> Tensor:
    inside = torch.linspace(-1.0, 1.0, 513, dtype=torch.float64)
    if normalize:
        near_ends = 1.0 - torch.logspace(-12, -2, 21, dtype=torch.float64)
    else:
        near_ends = torch.logspace(0, math.log10(_LARGE), 21, dtype=torch.float64)
    return torch.cat([inside, near_ends, -near_ends]).sort().values


def check_finite(formula: Formula, lines: Lines) -> None:
    """Fails, naming the line, where value or derivative is not finite for cosines in [-1, 1], or
    inner products of any size, at the default numbers. A logit of -inf is allowed: it leaves its
    pair out."""
    checked: dict[Expression, str] = {}
    for side in ("positive", "negative", "finish", "triplet", "regularizer"):
        value = getattr(formula, side)
        if value is not None:
            for e in topological(value):
                checked.setdefault(e, f"{side} is")
            for by in topological(value):
                if by.op == "leaf" and by.kind not in ("number", "positive"):
                    for e in topological(derivative(value, by)):
                        checked.setdefault(e, f"the derivative of {side} by {by!r} is")
    what_of, every = "cosine", "cosines in [-1, 1]"
    if not formula.normalize:
        what_of, every = "inner product", f"inner products, here up to {_LARGE:g}"
    leaves_out = formula.combine in ("logsumexp", "logsumexps")
    for dtype in (torch.float64, torch.float32):
        values = _values(list(checked), formula, dtype)
        for e, what in checked.items():
            at = _first_bad(e, values, leaves_out)
            if at is not None:
                fail(
                    f"{what} not finite at {what_of} {_at(values[COSINE], at):g} and the default "
                    f"parameters, in {dtype}: {e.op} gives {_at(values[e], at):g}; formulas have "
                    f"to be finite for all {every}, also where policy.where takes the other "
                    "argument",
                    lines.of.get(e) or formula.line,
                )


def _values(
    nodes: list[Expression], formula: Formula, dtype: torch.dtype
) -> dict[Expression, Tensor]:
    """Values of all nodes, arguments first, at all pairs of a cosine and another number."""
    names = (parameter.name for parameter in formula.numbers)
    numbers = dict(zip(names, default_params(formula), strict=True))
    others = torch.tensor(_OTHERS, dtype=dtype)[:, None]
    given = {variable.name for variable in formula.variables} - {TARGET_COSINE}
    variables = torch.tensor(_VARIABLES, dtype=dtype)[:, None]
    values = {COSINE: _cosines(formula.normalize).to(dtype)}
    for e in nodes:
        if e.op == "const":
            payload = bool(e.payload) if e.mask else value_of(e)
            values[e] = torch.tensor(payload, dtype=torch.bool if e.mask else dtype)
        elif e.op == "leaf" and e.kind == "number":
            values[e] = torch.tensor(numbers[str(e.payload)], dtype=dtype)
        elif e.op == "leaf":
            values.setdefault(e, variables if str(e.payload) in given else others)
        else:
            values[e] = OPERATIONS[e.op].eager(*(values[arg] for arg in e.args))
    return values


def _first_bad(
    e: Expression, values: dict[Expression, Tensor], leaves_out: bool
) -> tuple[int, int] | None:
    """A place where ``e`` is not finite although its arguments are; None without one."""
    if e.mask or e.op == "leaf" or bool(values[e].isfinite().all()):
        return None
    value = values[e]
    bad = ~value.isfinite()
    if leaves_out and e.op in ("const", "where"):
        bad &= value != -torch.inf
    for arg in e.args:
        if not arg.mask:
            bad = bad & (values[arg].isfinite() | (value.isnan() & ~values[arg].isnan()))
    places = _spread(bad).nonzero()
    return (int(places[0, 0]), int(places[0, 1])) if len(places) else None


def _at(value: Tensor, place: tuple[int, int]) -> float:
    return float(_spread(value)[place])


def _spread(value: Tensor) -> Tensor:
    """A value by others and cosines; their number does not depend on normalization."""
    return value.expand(len(_OTHERS), _cosines(True).numel())


def refuse_misspelled(cls: type, known: tuple[str, ...]) -> None:
    """An error for a method of a name so close to a known one that a formula was meant."""
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known or not inspect.isfunction(value):
            continue
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            line = Line(value.__code__.co_filename, value.__code__.co_firstlineno)
            fail(f"{cls.__name__}.{name} is never called; is {meant[0]} meant?", line)
