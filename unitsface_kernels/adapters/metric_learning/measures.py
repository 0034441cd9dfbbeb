"""Distances of the original, as the fused functions know them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import policy
from ...losses.measured_pairs import RAW


@dataclass(frozen=True)
class Measure:
    """What a pair is compared by.

    Attributes:
        similarity: inner products, larger for nearer pairs; else Euclidean distances.
        normalize: of unit vectors.
        power: of distances.
    """

    similarity: bool = True
    normalize: bool = True
    power: float = 1.0

    @property
    def sign(self) -> float:
        """Sign of margins and bases: formulas take similarities, minus a distance."""
        return 1.0 if self.similarity else -1.0

    @property
    def cosine(self) -> bool:
        return self.similarity and self.normalize

    @property
    def cosines_per_unit(self) -> float | None:
        """Factor of the cosine in a similarity that is linear in it; None: it is not linear."""
        if not self.normalize:
            return None
        return 1.0 if self.similarity else 2.0 if self.power == 2 else None

    def policy(self, form: type[policy.Pair], **numbers: float | str) -> policy.Pair:
        form = form if self.normalize else RAW[form]
        measure = "similarity" if self.similarity else "distance"
        return form(measure=measure, power=float(self.power), **numbers)

    def __call__(self, query: Tensor, reference: Tensor | None = None) -> Tensor:
        """(N, D), (M, D) -> (N, M), in the dtype of the embeddings."""
        reference = query if reference is None else reference
        dtype = query.dtype
        if not self.similarity:
            # Distances have no implementation in half precision.
            query = query.to(torch.promote_types(dtype, torch.float32))
            reference = reference.to(query.dtype)
        if self.normalize:
            query, reference = F.normalize(query), F.normalize(reference)
        if self.similarity:
            return query @ reference.T
        return (torch.cdist(query, reference) ** self.power).to(dtype)


COSINE = Measure()
EUCLIDEAN, SQUARED = Measure(similarity=False), Measure(similarity=False, power=2.0)

_SIMILARITIES, _DISTANCES = ("CosineSimilarity", "DotProductSimilarity"), ("LpDistance",)


def of_distance(distance: object, allowed: str = "") -> Measure:
    """The measure of an object of the original's classes; a measure is its own.

    ``allowed`` names what a loss is limited to: "cosine", or "multiple" of it.
    """
    found = distance if isinstance(distance, Measure) else _known(distance)
    if allowed == "cosine" and not found.cosine:
        raise ValueError(
            f"distance must be CosineSimilarity() of this loss, got {_shown(distance)}: "
            "similarities are cosines"
        )
    if allowed == "similarity" and not found.similarity:
        raise ValueError(
            f"distance must be DotProductSimilarity() of this loss, got {_shown(distance)}: "
            "logits are inner products"
        )
    if allowed == "multiple" and found.cosines_per_unit is None:
        raise ValueError(
            "distance must be CosineSimilarity() or LpDistance(power=2) of this loss, got "
            f"{_shown(distance)}: similarities are cosines"
        )
    return found


def _known(distance: object) -> Measure:
    kind, p, power = (
        type(distance).__name__,
        getattr(distance, "p", None),
        getattr(distance, "power", None),
    )
    normalize = getattr(distance, "normalize_embeddings", None)
    known = kind in (*_SIMILARITIES, *_DISTANCES) and p == 2 and isinstance(normalize, bool)
    if known and kind in _SIMILARITIES and power == 1:
        return Measure(normalize=bool(normalize))
    if known and kind in _DISTANCES and isinstance(power, (int, float)) and power > 0:
        return Measure(False, bool(normalize), float(power))
    raise ValueError(
        "distance must be CosineSimilarity(), DotProductSimilarity() or LpDistance(p=2), with or "
        f"without normalize_embeddings, got {_shown(distance)}: similarities are cosines, inner "
        "products or Euclidean distances"
    )


def _shown(distance: object) -> str:
    names = ("p", "power", "normalize_embeddings")
    values = (f"{n}={getattr(distance, n)}" for n in names if hasattr(distance, n))
    return f"{type(distance).__name__}({', '.join(values)})"
