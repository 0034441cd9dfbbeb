"""The registry of losses. Drivers, tests, benchmarks and documentation tables iterate over it."""

from __future__ import annotations

from . import margin_softmax, pair_logsumexp, pair_softmax, uss
from .spec import LossSpec, Parameter

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        uss.SPEC,
        margin_softmax.SPEC,
        pair_softmax.SPEC,
        pair_logsumexp.SPEC,
    )
}

__all__ = ["REGISTRY", "LossSpec", "Parameter"]
