"""The registry of losses. Drivers, tests, benchmarks and documentation tables iterate over it."""

from __future__ import annotations

from . import (
    adacos,
    batch_hard,
    circle,
    class_bce,
    clip,
    contrastive,
    curricularface,
    filtered_margin_softmax,
    info_nce,
    margin_softmax,
    multi_similarity,
    mv_softmax,
    npt,
    pair_bce,
    pair_logsumexp,
    pair_softmax,
    proxy_anchor,
    proxy_nca,
    siglip,
    simple_pairs,
    simple_proxy,
    sphereface2,
    uce,
    uss,
)
from .custom import CUSTOM, SCALARS, register, with_scalars
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
        curricularface.SPEC,
        mv_softmax.SPEC,
        filtered_margin_softmax.SPEC,
        adacos.SPEC,
        contrastive.SPEC,
        batch_hard.SPEC,
        proxy_nca.SPEC,
    )
}

#: Losses of the package that are called, or add up, in ways of their own: between two towers, of
#: proxies as rows and samples as columns, and means of pairs of features that are not normalized.
TOWERS: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        clip.SPEC,
        info_nce.SPEC,
        proxy_anchor.SPEC,
        siglip.SPEC,
        simple_pairs.SPEC,
        simple_proxy.SPEC,
    )
}


def find(name: str) -> LossSpec:
    """A loss of the registry or between two towers, or a user's own that this process has
    registered; each also with numbers that tensors give.
    """
    known = REGISTRY.get(name) or TOWERS.get(name) or CUSTOM.get(name)
    if known is None and SCALARS in name:
        of, *names = name.split(SCALARS)
        known = with_scalars(find(of), names)
    if known is None:
        raise LookupError(
            f"no loss {name!r} in this process: its policy must be defined before it is called"
        )
    return known


__all__ = [
    "CUSTOM",
    "EMPTY",
    "REGISTRY",
    "TOWERS",
    "Finish",
    "LossSpec",
    "Parameter",
    "Triplet",
    "find",
    "register",
]
