"""Same person or not: scores of pairs, and what a threshold on them is worth.

The metrics of up to :data:`LISTED_PAIRS` pairs come from a list of their scores. Of more pairs no
list is made: ``unitsface_kernels.metrics`` passes over them tile by tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.errors import UserError
from train.evaluation.rates import resolved, tar_at_fars
from unitsface_kernels import metrics

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Labels = NDArray[np.integer[Any]]
Device = torch.device | str

FOLDS = 10
FARS = (1e-2, 1e-1)
# 2000 images: the scores take 16 MB, and the folds, each of which sorts them, some seconds.
LISTED_PAIRS = 2_000_000
# Pairs within a bin, 3e-5 wide, count as ties in the AUC of more pairs.
AUC_BINS = 2**16


def all_pairs(features: Floats, labels: Labels) -> tuple[Floats, Bools]:
    """Cosines and same-identity flags of every unordered pair: (N, D), (N,) to two (N(N-1)/2,)."""
    wide = features.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    i, j = np.triu_indices(len(labels), k=1)
    return (unit @ unit.T)[i, j], labels[i] == labels[j]


def balanced_accuracy(scores: Floats, same: Bools, threshold: float) -> float:
    """Mean of the accuracies on positive and on negative pairs; "same" means score >= threshold.

    All pairs of a test set have far more negatives than positives, and plain accuracy would
    reward saying "different" to everything.
    """
    accepted = scores >= threshold
    return float((accepted[same].mean() + (~accepted[~same]).mean()) / 2)


def best_threshold(scores: Floats, same: Bools) -> float:
    """The threshold with the largest balanced accuracy: midway between two neighboring scores."""
    from sklearn.metrics import roc_curve  # slow to import

    far, tar, thresholds = roc_curve(same, scores)
    best = int(np.argmax(tar - far))
    above = thresholds[best]  # the smallest accepted score; inf when none is accepted
    below = scores[scores < above]
    if not np.isfinite(above) or below.size == 0:
        return float(scores.max() + 1) if not np.isfinite(above) else float(above)
    return float((above + below.max()) / 2)


def kfold_accuracy(scores: Floats, same: Bools, folds: int = FOLDS) -> tuple[float, float]:
    """Balanced accuracy by cross-validation over pairs: each fold is evaluated at the threshold
    that is best on the others. Mean and standard deviation over folds.

    Folds have equal fractions of positives and are drawn with a fixed seed.
    """
    from sklearn.model_selection import StratifiedKFold  # slow to import

    folds = min(folds, int(same.sum()), int((~same).sum()))
    if folds < 2:
        threshold = best_threshold(scores, same)
        return balanced_accuracy(scores, same, threshold), 0.0
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    accuracies = [
        balanced_accuracy(scores[test], same[test], best_threshold(scores[rest], same[rest]))
        for rest, test in splitter.split(scores[:, None], same)
    ]
    return float(np.mean(accuracies)), float(np.std(accuracies))


def auc(scores: Floats, same: Bools) -> float:
    from sklearn.metrics import roc_auc_score  # slow to import

    return float(roc_auc_score(same, scores))


@dataclass(frozen=True)
class Verification:
    pairs: int
    positives: int
    # Balanced: 10-fold, with the deviation over folds; from LISTED_PAIRS on at best_threshold, as
    # nothing is gained by fitting one number to so many pairs, and without a deviation.
    accuracy: float
    accuracy_std: float | None
    auc: float
    tar_at_far: dict[str, float]
    threshold: float | None  # learned, b / s
    accuracy_at_threshold: float | None  # balanced
    best_threshold: float  # over all pairs: for comparison with the learned one only

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def unresolved(self) -> list[str]:
        """The FARs that the negative pairs do not resolve."""
        negatives = self.pairs - self.positives
        return [far for far in self.tar_at_far if not resolved(float(far), negatives)]

    def __str__(self) -> str:
        text = f"AUC {self.auc:.3f}, accuracy {self.accuracy:.3f}"
        for far, tar in self.tar_at_far.items():
            shown = "not resolved" if far in self.unresolved() else f"{tar:.3f}"
            text += f", TAR@FAR={far} {shown}"
        if self.threshold is not None and self.accuracy_at_threshold is not None:
            text += f", accuracy {self.accuracy_at_threshold:.3f} at b/s = {self.threshold:.3f}"
        return text


def evaluate_pairs(scores: Floats, same: Bools, *, threshold: float | None = None) -> Verification:
    """Every metric of a verification test; (P,) scores, higher meaning more alike."""
    accuracy, std = kfold_accuracy(scores, same)
    return Verification(
        pairs=len(same),
        positives=int(same.sum()),
        accuracy=accuracy,
        accuracy_std=std,
        auc=auc(scores, same),
        tar_at_far={
            name.partition("=")[2]: tar for name, tar in tar_at_fars(scores, same, FARS).items()
        },
        threshold=threshold,
        accuracy_at_threshold=(
            None if threshold is None else balanced_accuracy(scores, same, threshold)
        ),
        best_threshold=best_threshold(scores, same),
    )


def count_pairs(labels: Labels) -> tuple[int, int]:
    """How many unordered pairs (N,) labels form, and how many of them are positive."""
    _, sizes = np.unique(labels, return_counts=True)
    return len(labels) * (len(labels) - 1) // 2, int((sizes * (sizes - 1) // 2).sum())


def has_both_kinds(labels: Labels) -> bool:
    """Whether (N,) labels form positive and negative pairs."""
    pairs, positives = count_pairs(labels)
    return 0 < positives < pairs


def on_device(features: Floats, labels: Labels, device: Device) -> tuple[Tensor, Tensor]:
    return (
        torch.as_tensor(features, dtype=torch.float32, device=device),
        torch.as_tensor(labels, dtype=torch.int64, device=device),
    )


def fit_threshold(
    feats: Tensor, labels: Tensor, learned: float | None
) -> tuple[metrics.BestThreshold, float | None]:
    """The best threshold over all pairs without a list of them, and the accuracy at the learned."""
    if learned is None:
        return metrics.best_threshold(feats, labels), None
    gap = metrics.threshold_gap(feats, labels, learned, scale=1.0)
    return gap.best, gap.accuracy


def evaluate_features(
    features: Floats, labels: Labels, *, threshold: float | None = None, device: Device = "cpu"
) -> Verification:
    """Every metric of a verification test on all pairs of (N, D) features with (N,) labels.

    Up to :data:`LISTED_PAIRS` those of :func:`evaluate_pairs`; beyond, in memory that does not
    grow with the pairs, on ``device``.
    """
    if not np.isfinite(features).all():
        raise UserError("the model's features are not finite")
    if not has_both_kinds(labels):
        raise UserError(f"{len(labels)} images form no positive or no negative pair")
    pairs, positives = count_pairs(labels)
    if pairs <= LISTED_PAIRS:
        return evaluate_pairs(*all_pairs(features, labels), threshold=threshold)
    given = on_device(features, labels, device)
    best, at_threshold = fit_threshold(*given, threshold)
    rates = metrics.tar_at_far(*given, FARS)
    return Verification(
        pairs=pairs,
        positives=positives,
        accuracy=best.accuracy,
        accuracy_std=None,
        auc=_auc(metrics.pair_histogram(*given, bins=AUC_BINS)),
        tar_at_far={f"{far:g}": tar for far, tar in zip(FARS, rates.tar.tolist(), strict=True)},
        threshold=threshold,
        accuracy_at_threshold=at_threshold,
        best_threshold=best.threshold,
    )


def _auc(histogram: metrics.PairHistogram) -> float:
    """Fraction of (positive, negative) pairs of pairs in the right order; ties count half."""
    positives, negatives = histogram.positives.double(), histogram.negatives.double()
    below = negatives.cumsum(0) - negatives / 2
    return float(positives @ below / (positives.sum() * negatives.sum()))
