"""Losses outside the registry: of users' policies, and those that read variables."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from .spec import LossSpec, ValidRows

if TYPE_CHECKING:
    from ..policy.definition import Formula, Policy

#: Beside the registry, over which tests and tables iterate.
CUSTOM: dict[str, LossSpec] = {}
#: In the name of a loss, before each of its numbers that tensors give.
SCALARS = "+"


def register(spec: LossSpec) -> LossSpec:
    """The spec of this name, ``spec`` if it is the first: a name identifies its formula."""
    return CUSTOM.setdefault(spec.name, spec)


def spec(policy: Policy | type[Policy]) -> LossSpec:
    """The loss of a policy; policies of equal formulas are one loss."""
    from .from_policy import of_formula

    formula = policy.formula
    name = f"{formula.name}-{digest(formula)[:16]}"
    known = CUSTOM.get(name)
    if known is None:
        rows = _valid_rows(formula)
        made = of_formula(formula, name=name, function="", source="", valid_rows=rows)
        known = register(made)
    return known


def _valid_rows(f: Formula) -> ValidRows:
    """Rows over which a mean is taken: those of the losses of the same form in the registry."""
    if f.topology == "class" or f.combine != "logsumexp":
        return "labeled"
    return "with_negatives" if f.positive is None else "with_positives"


def per_column(of: LossSpec) -> LossSpec:
    """The same formula with a threshold for every column's identity."""
    name = f"{of.name}-per-column"
    known = CUSTOM.get(name)
    return known or register(replace(of, name=name, threshold="per_column", policy=of.name))


def with_scalars(of: LossSpec, names: Sequence[str]) -> LossSpec:
    """The same loss, of which the numbers ``names`` are given by tensors, see ``policy.Scalar``."""
    from ..policy.scalars import with_scalars as moved
    from .from_policy import of_formula

    ordered = [parameter.name for parameter in of.parameters if parameter.name in names]
    name = SCALARS.join([of.name, *ordered])
    known = CUSTOM.get(name)
    if known is None:
        assert of.formula is not None
        made = of_formula(
            moved(of.formula, ordered),
            name=name,
            function=of.function,
            source=of.source,
            valid_rows=of.valid_rows,
        )
        # The first number is that of the tiles.
        tiles = None if of.parameters[0].name in names else of.tiles
        known = register(replace(made, threshold=of.threshold, tiles=tiles))
    return known


@cache
def digest(f: Formula) -> str:
    """Digest of what decides a pair's value and the kernels, names of fields included."""
    from ..policy.expression import topological

    roots = [f.positive, f.negative, *f.weights, f.finish, f.triplet]
    if f.regularizer is not None:
        roots.append(f.regularizer)
    # A node by the places of its arguments: as text, shared ones would be written many times.
    places = {e: i for i, e in enumerate(topological(*(e for e in roots if e is not None)))}
    nodes = [
        (e.op, [places[arg] for arg in e.args], repr(e.payload), e.kind, e.mask) for e in places
    ]
    ends = [None if e is None else places[e] for e in roots]
    form = (f.topology, f.combine) if f.normalize else (f.topology, f.combine, "inner products")
    parts = (*form, f.numbers, f.variables, f.threshold, nodes, ends)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
