"""The registry of losses. Drivers, tests, benchmarks and documentation tables iterate over it."""

from __future__ import annotations

from . import (
    class_bce,
    margin_softmax,
    npt,
    pair_bce,
    pair_logsumexp,
    pair_softmax,
    sphereface2,
    uce,
    uss,
)
from .spec import LossSpec, Parameter, Triplet

REGISTRY: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        uss.SPEC,
        pair_bce.SPEC,
        margin_softmax.SPEC,
        uce.SPEC,
        class_bce.SPEC,
        sphereface2.SPEC,
        pair_softmax.SPEC,
        pair_logsumexp.SPEC,
        npt.SPEC,
    )
}

__all__ = ["REGISTRY", "LossSpec", "Parameter", "Triplet"]
