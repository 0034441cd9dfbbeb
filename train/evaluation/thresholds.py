"""One threshold for all identities: unified, beside one per identity, and one against many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from train.evaluation.verification import (
    LISTED_PAIRS,
    Device,
    Floats,
    Labels,
    all_pairs,
    balanced_accuracy,
    best_threshold,
    count_pairs,
    fit_threshold,
    on_device,
)
from unitsface_kernels import metrics

# A tile of cosines takes 32 MB, and as much again for each of a few copies.
TILE_ROWS, TILE_COLUMNS = 1024, 8192


@dataclass(frozen=True)
class Unified:
    """The learned threshold b / s against the best one; accuracies are balanced over pairs."""

    pairs: int
    positives: int
    best: float  # fitted on these very pairs
    accuracy_at_best: float
    learned: float | None
    accuracy_at_learned: float | None

    @property
    def gap(self) -> float | None:
        return None if self.learned is None else self.learned - self.best

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gap": self.gap}


def unify(
    features: Floats, labels: Labels, learned: float | None = None, device: Device = "cpu"
) -> Unified:
    """Over all unordered pairs of (N, D) features, in memory that does not grow with them."""
    pairs, positives = count_pairs(labels)
    if pairs <= LISTED_PAIRS:
        # Among equally good thresholds the one that evaluate_features takes.
        scores, same = all_pairs(features, labels)
        threshold = best_threshold(scores, same)
        accuracy = balanced_accuracy(scores, same, threshold)
        at_learned = None if learned is None else balanced_accuracy(scores, same, learned)
        return Unified(pairs, positives, threshold, accuracy, learned, at_learned)
    best, at_learned = fit_threshold(*on_device(features, labels, device), learned)
    return Unified(pairs, positives, best.threshold, best.accuracy, learned, at_learned)


@dataclass(frozen=True)
class Identification:
    """One against many: each identity's first image stands for it, its others are recognized.

    Fractions of the probes that are right, each under a stricter condition than the one before
    (docs/metrics.md): the nearest identity is theirs; a threshold per identity, or one for all,
    lies between the cosine with their own and those with all others. ``class_wise`` is the
    identities' side: no probe of another identity comes as near as theirs.
    """

    identities: int
    probes: int
    sample_wise: float
    class_wise: float
    class_uniform: float
    uniform: float  # at the best threshold for it
    uniform_threshold: float
    uniform_at_learned: float | None  # nothing fitted


def identify(
    features: Floats, labels: Labels, learned: float | None = None, device: Device = "cpu"
) -> Identification | None:
    """The rates of identification; None where no identity has a second image."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    probe = np.ones(len(labels), dtype=bool)
    probe[first] = False
    if not probe.any():
        return None
    feats, classes = on_device(features[probe], inverse[probe], device)
    gallery = torch.as_tensor(features[first], dtype=torch.float32, device=device)
    rates = metrics.classification_accuracy(feats, gallery, classes)
    at_learned = None
    if learned is not None:
        columns = torch.arange(len(gallery), device=device)
        own, other = _extremes(feats, classes, gallery, columns, paired=False)
        at_learned = float(((own >= learned) & (other < learned)).double().mean())
    return Identification(
        len(gallery),
        len(feats),
        *(rates.sample_wise, rates.class_wise, rates.class_uniform, rates.uniform),
        rates.threshold,
        at_learned,
    )


@dataclass(frozen=True)
class Spread:
    """One threshold per identity with a positive and a negative pair; all (K,)."""

    identities: NDArray[np.int64]  # labels
    thresholds: NDArray[np.float64]  # the best one for the identity's own pairs
    accuracies: NDArray[np.float64]  # balanced, there
    lowest_positive: NDArray[np.float64]
    highest_negative: NDArray[np.float64]

    def separated_by(self, threshold: float) -> float:
        """Fraction of the identities that a threshold separates from all others."""
        right = (self.highest_negative < threshold) & (threshold <= self.lowest_positive)
        return float(right.mean()) if len(right) else float("nan")

    def columns(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """A table with a row per identity."""
        return {
            "identity": [names[i] for i in self.identities],
            "threshold": self.thresholds.tolist(),
            "accuracy": self.accuracies.tolist(),
            "lowest_positive": self.lowest_positive.tolist(),
            "highest_negative": self.highest_negative.tolist(),
        }

    def to_dict(self, unified: Unified) -> dict[str, Any]:
        values = self.thresholds
        figures: dict[str, Any] = {"identities": len(values)}
        if len(values):
            figures |= {
                "mean_threshold": float(values.mean()),
                "std_of_thresholds": float(values.std()),
                "smallest_threshold": float(values.min()),
                "largest_threshold": float(values.max()),
                "mean_accuracy": float(self.accuracies.mean()),
                "separated_by_best": self.separated_by(unified.best),
            }
            if unified.learned is not None:
                figures["separated_by_learned"] = self.separated_by(unified.learned)
        return figures


def per_identity(features: Floats, labels: Labels, device: Device = "cpu") -> Spread:
    """The values behind UniTSFace's figure 1 (NeurIPS 2023): the best threshold of each identity,
    to be compared with the learned unified one.

    Two passes over all ordered pairs, in memory O(N).
    """
    feats, identities = on_device(features, labels, device)
    found = metrics.identity_thresholds(feats, identities)
    low, high = _extremes(feats, identities, feats, identities, paired=True)
    known = found.identities.to(low.device)
    place = torch.searchsorted(known, identities).clamp(max=max(0, len(known) - 1))
    member = known[place] == identities if len(known) else torch.zeros_like(identities).bool()
    lowest = low.new_full((len(known),), torch.inf)
    highest = low.new_full((len(known),), -torch.inf)
    lowest.scatter_reduce_(0, place[member], low[member], "amin")
    highest.scatter_reduce_(0, place[member], high[member], "amax")
    return Spread(
        identities=found.identities.numpy(),
        thresholds=found.thresholds.numpy(),
        accuracies=found.accuracies.numpy(),
        lowest_positive=lowest.double().cpu().numpy(),
        highest_negative=highest.double().cpu().numpy(),
    )


def _extremes(
    rows: Tensor, labels: Tensor, columns: Tensor, column_labels: Tensor, *, paired: bool
) -> tuple[Tensor, Tensor]:
    """Per row the lowest cosine with a column of its label and the highest with one of another,
    (N,) each; inf and -inf without any. ``paired``: row i is column i, which does not count.
    """
    low = rows.new_full((len(rows),), torch.inf)
    high = rows.new_full((len(rows),), -torch.inf)
    rows, columns = F.normalize(rows, dim=1), F.normalize(columns, dim=1)
    for a in range(0, len(rows), TILE_ROWS):
        own = slice(a, a + TILE_ROWS)
        for b in range(0, len(columns), TILE_COLUMNS):
            other = slice(b, b + TILE_COLUMNS)
            cosines = rows[own] @ columns[other].T
            same = labels[own, None] == column_labels[None, other]
            negative = cosines.masked_fill(same, -torch.inf).amax(1)
            if paired and -same.shape[0] < a - b < same.shape[1]:
                same.diagonal(a - b).fill_(False)
            positive = cosines.masked_fill(~same, torch.inf).amin(1)
            low[own] = torch.minimum(low[own], positive)
            high[own] = torch.maximum(high[own], negative)
    return low, high
