"""The registry of losses. Drivers, tests, benchmarks and documentation tables iterate over it."""

from __future__ import annotations

from . import (
    batch_hard,
    circle,
    class_bce,
    contrastive,
    margin_softmax,
    multi_similarity,
    npt,
    pair_bce,
    pair_logsumexp,
    pair_softmax,
    proxy_nca,
    sphereface2,
    uce,
    uss,
)
from .custom import CUSTOM, register
from .spec import EMPTY, Finish, LossSpec, Parameter, Triplet

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
        circle.SPEC,
        multi_similarity.SPEC,
        npt.SPEC,
        contrastive.SPEC,
        batch_hard.SPEC,
        proxy_nca.SPEC,
    )
}


def find(name: str) -> LossSpec:
    """A loss of the registry, or a user's own that this process has registered."""
    known = REGISTRY.get(name) or CUSTOM.get(name)
    if known is None:
        raise LookupError(
            f"no loss {name!r} in this process: its policy must be defined before it is called"
        )
    return known


__all__ = [
    "CUSTOM",
    "EMPTY",
    "REGISTRY",
    "Finish",
    "LossSpec",
    "Parameter",
    "Triplet",
    "find",
    "register",
]
