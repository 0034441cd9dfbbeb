"""The ten-fold protocol of LFW, as published with FaceNet and insightface.

Pairs fall into ten contiguous folds, unshuffled. Each fold is judged at the threshold on squared
distances of unit features that is best on the nine others: for the accuracy out of a grid of 0.01,
for the share of positives accepted ("validation rate") where a grid of 0.001, interpolated, reaches
the false accept rate. See recognition/arcface_torch/eval/verification.py of insightface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

FOLDS = 10
FAR = 1e-3


@dataclass(frozen=True)
class TenFolds:
    accuracy: float
    accuracy_std: float
    validation: float  # at FAR
    validation_std: float


def fold_of(pairs: int) -> NDArray[np.int64]:
    """(pairs,) numbers of the folds; the first ones take what does not divide."""
    parts = np.array_split(np.arange(pairs), FOLDS)
    return np.repeat(np.arange(FOLDS), [len(part) for part in parts])


def ten_folds(distances: Floats, same: Bools, fold: NDArray[np.int64]) -> TenFolds:
    """(P,) squared distances, flags and fold numbers to the protocol's figures."""
    used = np.unique(fold)  # pairs may be missing
    accuracies = _accuracies(distances, same, fold, used, np.arange(0, 4, 0.01))
    rates = _validation_rates(distances, same, fold, used, np.arange(0, 4, 0.001))
    return TenFolds(
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        validation=float(np.mean(rates)) if rates else float("nan"),
        validation_std=float(np.std(rates)) if rates else float("nan"),
    )


def _accepted(
    distances: Floats, chosen: Bools, fold: NDArray[np.int64], thresholds: Floats
) -> NDArray[np.int64]:
    """(FOLDS, T): how many of the chosen pairs of each fold are below each threshold."""
    first = np.searchsorted(thresholds, distances[chosen], side="right")
    counts = np.zeros((FOLDS, len(thresholds) + 1), dtype=np.int64)
    np.add.at(counts, (fold[chosen], first), 1)
    return counts[:, :-1].cumsum(1)


def _accuracies(
    distances: Floats, same: Bools, fold: NDArray[np.int64], used: Any, thresholds: Floats
) -> list[float]:
    positives = _accepted(distances, same, fold, thresholds)
    negatives = _accepted(distances, ~same, fold, thresholds)
    sizes = np.bincount(fold, minlength=FOLDS)
    different = np.bincount(fold[~same], minlength=FOLDS)
    correct = positives + different[:, None] - negatives
    return [
        float(correct[k, np.argmax(correct.sum(0) - correct[k])] / sizes[k]) for k in used.tolist()
    ]


def _validation_rates(
    distances: Floats, same: Bools, fold: NDArray[np.int64], used: Any, thresholds: Floats
) -> list[float]:
    """Folds without positives have none. Where several thresholds reach FAR, the largest counts."""
    negatives = _accepted(distances, ~same, fold, thresholds)
    different = np.bincount(fold[~same], minlength=FOLDS)
    rates = []
    for k in used.tolist():
        positives = distances[same & (fold == k)]
        others = different.sum() - different[k]
        if not positives.size or not others:
            continue
        far = (negatives.sum(0) - negatives[k]) / others
        threshold = np.interp(FAR, far, thresholds) if far.max() >= FAR else 0.0
        rates.append(float((positives < threshold).mean()))
    return rates
