"""Closed-set accuracy: sample-wise, class-wise and uniform, without the N x C matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import validate
from .thresholds import middle
from .tiles import Scores


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Shares of the samples with a label that are right; see :func:`classification_accuracy`.

    Attributes:
        sample_wise, class_wise, class_uniform, uniform: in [0, 1].
        threshold: of ``uniform``, midway between ``below`` and ``at_most``.
        below, at_most: every threshold in (below, at_most] gives the same uniform accuracy; NaN,
            as ``threshold``, if no sample is right at any.
        samples: number of samples with a label.
    """

    sample_wise: float
    class_wise: float
    class_uniform: float
    uniform: float
    threshold: float
    below: float
    at_most: float
    samples: int


@dataclass
class _Extremes:
    """The metrics that decide, all float32."""

    target: Tensor  # (N,) of each sample with its class; NaN without one
    wrong_of_row: Tensor  # (N,) largest with another class
    wrong_of_column: Tensor  # (C,) largest of samples of other classes


def _extremes(
    scores: Scores, labels: Tensor, count: int, bias: Tensor | None, scale: float
) -> _Extremes:
    labels = labels.to(torch.int64)
    feats = scores.feats
    lowest = feats.new_full((max(len(labels), count),), -math.inf, dtype=torch.float32)
    found = _Extremes(
        target=torch.full_like(lowest[: len(labels)], math.nan),
        wrong_of_row=lowest[: len(labels)].clone(),
        wrong_of_column=lowest[:count].clone(),
    )
    for tile in scores.tiles():
        metric = tile.cosines
        if scale != 1.0:
            metric.mul_(scale)
        if bias is not None:
            metric.sub_(bias if bias.numel() == 1 else bias[tile.other : tile.end])
        targets = labels[tile.start : tile.stop]
        inside = ((targets >= tile.other) & (targets < tile.end)).nonzero()[:, 0]
        column = targets[inside] - tile.other
        found.target[tile.start + inside] = metric[inside, column]
        metric[inside, column] = -math.inf
        metric[targets < 0] = -math.inf
        # maximum and amax hand NaN on.
        row = found.wrong_of_row[tile.start : tile.stop]
        torch.maximum(row, metric.amax(dim=1), out=row)
        columns = found.wrong_of_column[tile.other : tile.end]
        torch.maximum(columns, metric.amax(dim=0), out=columns)
    return found


def _most_overlapping(low: Tensor, high: Tensor, group: Tensor, groups: int) -> tuple[Tensor, int]:
    """Largest number of intervals (low, high] with a common point, per group.

    Returns:
        (groups,) int64 numbers, and the index of the interval whose ``high`` is a common point of
        the most, over all groups. O(N log N).
    """
    # Downwards, an interval begins at its high end and is over at its low end. At one value what
    # is over goes first: (a, b] and (b, c] have no common point.
    count = len(low)
    value = torch.cat([low, high])
    step = torch.ones(2 * count, dtype=torch.int64, device=low.device)
    step[:count] = -1
    both = torch.cat([group, group])
    order = value.argsort(descending=True, stable=True)
    order = order[both[order].argsort(stable=True)]
    # Every group's steps add up to 0: no group begins with the rest of another.
    overlap = step[order].cumsum(0)
    most = torch.zeros(groups, dtype=torch.int64, device=low.device)
    most.scatter_reduce_(0, both[order], overlap, "amax")
    return most, int(order[overlap.argmax()]) - count


def _uniform_interval(low: Tensor, high: Tensor, best: Tensor) -> tuple[float, float]:
    """The thresholds (below, at_most] that are in just the intervals that ``best`` is in."""
    ends = torch.cat([low, high])
    return float(ends[ends < best].max()), float(best)


def classification_accuracy(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: float | Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> ClassificationAccuracy:
    """Accuracies of a classifier with metrics m_ij = scale * cos(x_i, w_j) - bias_j, exactly.

    For a sample i of class y:

    - sample-wise: m_iy > m_ij for all j != y. Ties are wrong.
    - class-uniform: each class has one threshold t_y, and m_iy >= t_y > m_ij for all j != y. The
      thresholds are the best for the samples of their classes.
    - uniform: one threshold t for all: m_iy >= t > m_ij for all j != y. The accuracy is the largest
      over all t.
    - class-wise: m_iy > m_i'y for all samples i' of other classes: a threshold of class y on the
      metrics with class y separates its samples from all others.

    Uniform accuracy is that of "Rediscovering BCE Loss for Uniform Classification"
    (arXiv 2403.07289), which compares it with a sample-wise and a class-wise one. Which of our two
    figures per class is the paper's could not be checked; how ties count is ours.

    One pass over all pairs of samples and classes, in memory O(N + C).

    Args:
        feats: (N, D) raw features; normalized inside.
        weight: (C, D) raw class weights.
        labels: (N,) classes; -1 is ignored.
        bias: a float, a one-element tensor or (C,), in the units of scale * cosine; None: 0.
        scale: > 0; the default makes metrics and thresholds cosines.
        backend: "auto", "native" or "reference".

    Returns:
        The accuracies; NaN without a sample that has a label.

    Raises:
        ValueError, TypeError: wrong arguments, or a metric that is NaN.
    """
    validate.features("feats", feats)
    validate.features("weight", weight, feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    validate.in_range("labels", labels, -1, weight.shape[0])
    validate.number("scale", scale, above=0.0)
    if bias is not None:
        one = isinstance(bias, Tensor) and bias.numel() == 1
        per, size = (None, None) if one else ("class", weight.shape[0])
        validate.threshold("bias", bias, feats, per=per, size=size)
        bias = torch.as_tensor(bias, dtype=torch.float32, device=feats.device).detach()
    classes = torch.arange(weight.shape[0], device=feats.device)
    scores = Scores(feats, labels, weight, classes, backend)
    found = _extremes(scores, labels, weight.shape[0], bias, float(scale))
    kept = labels >= 0
    label, target, wrong = (
        labels[kept].to(torch.int64),
        found.target[kept],
        found.wrong_of_row[kept],
    )
    validate.no_nan_scores(int((target.isnan() | wrong.isnan()).sum()))
    samples = len(label)
    if samples == 0:
        none = math.nan
        return ClassificationAccuracy(none, none, none, none, none, none, none, samples=0)
    right = target > wrong
    low, high = wrong[right], target[right]
    below = at_most = math.nan
    class_uniform = uniform = 0
    if len(low):
        group = label[right]
        class_uniform = int(_most_overlapping(low, high, group, weight.shape[0])[0].sum())
        overlap, index = _most_overlapping(low, high, torch.zeros_like(group), 1)
        uniform = int(overlap)
        below, at_most = _uniform_interval(low, high, high[index])
    return ClassificationAccuracy(
        sample_wise=int(right.sum()) / samples,
        class_wise=int((target > found.wrong_of_column[label]).sum()) / samples,
        class_uniform=class_uniform / samples,
        uniform=uniform / samples,
        threshold=math.nan if math.isnan(at_most) else middle(below, at_most),
        below=below,
        at_most=at_most,
        samples=samples,
    )
