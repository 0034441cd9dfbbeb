"""The registry of losses. Drivers, tests, benchmarks and documentation tables iterate over it."""

from __future__ import annotations

from . import margin_softmax, npt, uss
from .spec import LossSpec, Parameter, Triplet

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        uss.SPEC,
        margin_softmax.SPEC,
        npt.SPEC,
    )
}

__all__ = ["REGISTRY", "LossSpec", "Parameter", "Triplet"]
