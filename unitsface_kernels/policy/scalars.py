"""Numbers of a formula as variables, which tensors give their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .expression import Expression, leaf, node, topological
from .formula import Formula
from .variable import Variable


def with_scalars(formula: Formula, names: Sequence[str]) -> Formula:
    """The same formula, of which the numbers ``names`` are scalars like a ``policy.Scalar``."""
    moved: dict[Expression, Expression] = {}
    for number in formula.numbers:
        if number.name in names:
            of = leaf(number.name, "number", number.choices)
            moved[of] = leaf(number.name, "scalar")

    def of_scalars(e: Expression | None) -> Expression | None:
        for inner in () if e is None else topological(e):
            if inner not in moved:
                args = tuple(moved[arg] for arg in inner.args)
                others = inner.payload, inner.kind, inner.mask, inner.choices
                moved[inner] = node(inner.op, args, *others)
        return None if e is None else moved[e]

    positive, negative = of_scalars(formula.positive), of_scalars(formula.negative)
    first, second = (of_scalars(weight) for weight in formula.weights)
    assert first is not None
    assert second is not None
    least = {number.name: number.minimum for number in formula.numbers}
    positive_ones = {name for name, bound in least.items() if bound is not None and bound >= 0.0}
    scalars = [Variable(name, "scalar", nonzero=name in positive_ones) for name in names]
    if formula.combine not in ("sum", "softplus"):
        # Over classes tiles compute logits of negatives only, as in ``definition.py``.
        of_tiles = (negative, positive if formula.topology == "pair" else None)
        read = set(topological(*(e for e in of_tiles if e is not None)))
        scalars = [replace(v, streamed=leaf(v.name, "scalar") in read) for v in scalars]
    return replace(
        formula,
        numbers=tuple(number for number in formula.numbers if number.name not in names),
        variables=(*scalars, *formula.variables),
        positive=positive,
        negative=negative,
        weights=(first, second),
        finish=of_scalars(formula.finish),
        triplet=of_scalars(formula.triplet),
        regularizer=of_scalars(formula.regularizer),
    )
