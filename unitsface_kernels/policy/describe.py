"""Formulas as lines of text, for the headers of generated code and for ``show``."""

from __future__ import annotations

from .emit import Dialect, straight_line
from .expression import Expression, is_const, topological
from .formula import Formula
from .operations import OPERATIONS
from .text import comparison, name_of

_INFIX = {"add", "sub", "mul", "div", "neg", "lt", "le", "eq", "and", "or"}


def _spelling(op: str) -> str:
    if op in _INFIX:
        return OPERATIONS[op].triton
    return f"{op}({', '.join(f'{{{i}}}' for i in range(OPERATIONS[op].arity))})"


TEXT = Dialect(
    spelling=_spelling,
    literal=lambda value: str(value) if isinstance(value, bool) else f"{value:g}",
    declare=lambda name, text, mask: f"{name} = {text}",
    declare_parts=lambda name, call: f"{name} = {call}",
    part=lambda name, part: name,
)


def described(outputs: dict[str, Expression]) -> list[str]:
    """A line for each of ``outputs``, and before them those of what they share."""
    names = {
        e: comparison(e) or name_of(e.payload)
        for e in topological(*outputs.values())
        if e.op == "leaf" or comparison(e)
    }
    lines, texts = straight_line(TEXT, outputs, names)
    return [*lines, *(f"{name} = {text}" for name, text in texts.items() if name != text)]


def describe(formula: Formula) -> list[str]:
    """What a formula is."""
    outputs = {
        "positive": formula.positive,
        "negative": formula.negative,
        "positive_weight": formula.weights[0],
        "negative_weight": formula.weights[1],
        "finish": formula.finish,
        "triplet": formula.triplet,
        "regularizer": formula.regularizer,
    }
    shown = {
        name: e
        for name, e in outputs.items()
        if e is not None and not (name.endswith("weight") and is_const(e, 1.0))
    }
    head = f"{name_of(formula.name)}: {formula.combine} over {_COLUMNS[formula.topology]}"
    return [f"{head}.", *described(shown)]


_COLUMNS = {"pair": "pairs of samples", "class": "samples and classes"}
