"""Losses of users' policies, beside the registry."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from ..policy.definition import Formula, Policy
from . import REGISTRY
from .from_policy import spec_of
from .spec import LossSpec

#: Specs of policies by their name, which is that of the class and a hash of the formula.
CUSTOM: dict[str, LossSpec] = {}


def find(name: str) -> LossSpec:
    """A loss of the registry or of a policy that this process knows."""
    return REGISTRY.get(name) or CUSTOM[name]


def spec(policy: Policy) -> LossSpec:
    """The loss of a policy; equal formulas are one loss."""
    formula = policy.formula
    name = f"{formula.name}-{_digest(formula)}"
    if name not in CUSTOM:
        CUSTOM[name] = spec_of(type(policy), name=name, function="", source="")
    return CUSTOM[name]


def _digest(f: Formula) -> str:
    parts = (f.topology, f.combine, f.numbers, f.variables, f.threshold, f.positive, f.negative)
    return hashlib.sha256(repr((*parts, f.weights, f.finish)).encode()).hexdigest()[:16]


def per_column(of: LossSpec) -> LossSpec:
    """The same formula with a threshold for every column's identity."""
    name = f"{of.name}-per-column"
    if name not in CUSTOM:
        CUSTOM[name] = replace(of, name=name, threshold="per_column", policy=of.name)
    return CUSTOM[name]
