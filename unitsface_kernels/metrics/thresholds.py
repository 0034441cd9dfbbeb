"""The cosine threshold that best separates positive from negative pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import validate
from .order_statistics import ScorePartition
from .tiles import Scores
from .verification import accepted_pairs

ACCURACIES = ("balanced", "plain")


@dataclass(frozen=True)
class BestThreshold:
    """See :func:`best_threshold`.

    Attributes:
        threshold: midway between ``rejected`` and ``accepted``; where one of them is infinite, the
            other one (the next larger float32 number if all scores are rejected).
        accuracy: of the rule "same identity if the score is at least the threshold".
        rejected: the largest score below, -inf if there is none.
        accepted: the smallest score that is accepted, inf if there is none. Every threshold in
            (rejected, accepted] gives the same accuracy.
    """

    threshold: float
    accuracy: float
    rejected: float
    accepted: float


@dataclass(frozen=True)
class ThresholdGap:
    """See :func:`threshold_gap`.

    Attributes:
        learned: b / scale.
        best: the threshold with the highest accuracy.
        gap: ``learned`` - ``best.threshold``.
        accuracy: at the learned threshold.
    """

    learned: float
    best: BestThreshold
    gap: float
    accuracy: float


class _Objective:
    """Accuracy as an exact integer: accepted positives and negatives, each with a weight."""

    def __init__(self, kind: str, positives: int, negatives: int) -> None:
        self.kind, self.positives, self.negatives = kind, positives, negatives
        self.weights = (1, 1)
        if kind == "balanced":
            common = math.gcd(positives, negatives)
            self.weights = (negatives // common, positives // common)
        largest = self.weights[0] * positives + self.weights[1] * negatives
        # Python's integers where 64 bits might not do.
        self.dtype = np.int64 if largest < 2**62 else object

    def __call__(self, positives: Tensor, negatives: Tensor) -> np.ndarray:
        """The larger the better, of counts of accepted pairs."""
        tp, fp = (t.numpy().astype(self.dtype) for t in (positives, negatives))
        return tp * self.weights[0] - fp * self.weights[1]

    def accuracy(self, accepted: Tensor) -> float:
        tp, fp = (int(n) for n in accepted)
        if self.kind == "plain":
            return (tp + self.negatives - fp) / (self.positives + self.negatives)
        return (tp / self.positives + 1.0 - fp / self.negatives) / 2.0


def middle(rejected: float, accepted: float) -> float:
    """A threshold in (rejected, accepted], midway if both are finite."""
    if math.isinf(accepted):
        value = torch.tensor(rejected, dtype=torch.float32)
        return float(torch.nextafter(value, torch.tensor(math.inf)))
    return accepted if math.isinf(rejected) else (rejected + accepted) / 2.0


def _search(partition: ScorePartition, objective: _Objective) -> int:
    """Index of the first accepted interval of the best threshold.

    Branch and bound: no threshold within an interval is better than one that accepts its positives
    and rejects its negatives. Intervals whose bound beats what is known are cut, best first. The
    interval below the best threshold is cut as well, for its largest score.
    """
    while True:
        above = partition.at_or_above()
        known = objective(*above)
        best = int(known.argmax())
        bound = objective(above[0, :-1], above[1, 1:])
        better = np.flatnonzero((bound > known[best]) & (partition.size.numpy() > 1))
        better = better[np.argsort(-bound[better], kind="stable")]
        ends = [i for i in (best, best - 1) if 0 <= i < len(partition.low)]
        wanted = torch.tensor([*better.tolist(), *ends], dtype=torch.int64)
        if not partition.resolve(wanted):
            return best


def _best(partition: ScorePartition, kind: str) -> tuple[BestThreshold, _Objective]:
    positives, negatives = partition.num_positives, partition.num_negatives
    validate.both_kinds(positives, negatives)
    objective = _Objective(kind, positives, negatives)
    index = _search(partition, objective)
    thresholds = partition.thresholds()
    accepted = float(thresholds[index])
    rejected = float(thresholds[index - 1]) if index > 0 else -math.inf
    accuracy = objective.accuracy(partition.at_or_above()[:, index])
    return BestThreshold(middle(rejected, accepted), accuracy, rejected, accepted), objective


def best_threshold(
    feats: Tensor,
    labels: Tensor,
    *,
    accuracy: str = "balanced",
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    backend: str = "auto",
) -> BestThreshold:
    """The unified cosine threshold with the highest accuracy over all pairs, exactly.

    A pair is called positive if its score, the float32 cosine that the backend computes, is at
    least the threshold. Where several separate thresholds are equally good, one of them is given.
    Three to five passes over all pairs.

    Args:
        feats: (N, D) raw features; normalized inside.
        labels: (N,) identities; -1 is ignored.
        accuracy: "balanced": (TAR + 1 - FAR) / 2. "plain": the share of all pairs that are called
            right; negatives outnumber positives so much that it may call almost nothing positive.
        other: (M, D) columns to compare with; None: every unordered pair of rows once.
        other_labels: (M,) their identities.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: wrong arguments, no positive or no negative pair, or a pair whose
            cosine is NaN.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    validate.choice("accuracy", accuracy, ACCURACIES)
    partition = ScorePartition(Scores(feats, labels, other, other_labels, backend))
    return _best(partition, accuracy)[0]


def threshold_gap(
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor,
    scale: float,
    *,
    accuracy: str = "balanced",
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    backend: str = "auto",
) -> ThresholdGap:
    """Distance of the learned threshold b / scale from the best one, and the cost of it.

    Args:
        b: the learned threshold of a loss, in logit units: a float or a one-element tensor.
        scale: the loss's scale.
        feats, labels, accuracy, other, other_labels, backend: as for :func:`best_threshold`.

    Raises:
        ValueError, TypeError: as :func:`best_threshold`.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    validate.choice("accuracy", accuracy, ACCURACIES)
    validate.number("scale", scale, above=0.0)
    if isinstance(b, Tensor):
        validate.threshold("b", b, b)
        b = float(b)
    validate.number("b", b)
    scores = Scores(feats, labels, other, other_labels, backend)
    best, objective = _best(ScorePartition(scores), accuracy)
    learned = b / scale
    accepted, _ = accepted_pairs(scores, learned)
    return ThresholdGap(learned, best, learned - best.threshold, objective.accuracy(accepted))
