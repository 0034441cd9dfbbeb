"""The ROC of all pairs in memory that does not grow with their number.

One pass counts scores in narrow bins, which gives exact points at the bins' edges; the points at
the usual false accept rates are exact whatever the bins (docs/metrics.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.evaluation import rates
from train.evaluation.verification import Device, Floats, Labels, on_device
from unitsface_kernels import metrics

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# 3e-5 wide. Between two edges the curve is known at the rates of FARS only.
BINS = 2**16


@dataclass(frozen=True)
class RatePoint:
    """The lowest threshold that accepts at most a fraction ``far`` of the negative pairs."""

    far: float  # requested
    tar: float
    threshold: float
    achieved_far: float


@dataclass(frozen=True)
class Roc:
    """Rates of the pairs with a score of at least each threshold."""

    thresholds: NDArray[np.float64]  # (T,) ascending
    far: NDArray[np.float64]  # (T,) from 1 down to 0
    tar: NDArray[np.float64]  # (T,) likewise
    positives: int
    negatives: int
    at: tuple[RatePoint, ...]  # those of FARS that the negatives resolve
    unresolved: tuple[float, ...]  # those of FARS below one negative pair of all

    @property
    def auc(self) -> float:
        """Area under straight lines between the points: scores within a bin count as ties."""
        steps = self.far[:-1] - self.far[1:]
        return float((steps * (self.tar[:-1] + self.tar[1:])).sum() / 2)

    def to_dict(self) -> dict[str, Any]:
        """The points at FARS; None where the negative pairs do not resolve the rate."""
        values: dict[str, Any] = {f"{p.far:g}": vars(p) for p in self.at}
        return {
            "positives": self.positives,
            "negatives": self.negatives,
            "auc": self.auc,
            "tar_at_far": {f"{far:g}": values.get(f"{far:g}") for far in FARS},
        }

    def __str__(self) -> str:
        """A line per rate."""
        lines = [f"TAR@FAR={p.far:g} {p.tar:.4f} at {p.threshold:.4f}" for p in self.at]
        lines += [
            f"TAR@FAR={far:g} not resolved: needs {round(1 / far)} negative pairs, "
            f"there are {self.negatives}"
            for far in self.unresolved
        ]
        return "\n".join(sorted(lines, key=lambda line: float(line.split("=")[1].split()[0])))


def roc_curve(features: Floats, labels: Labels, device: Device = "cpu") -> Roc:
    """All unordered pairs of (N, D) features, whose (N,) labels form pairs of both kinds."""
    feats, identities = on_device(features, labels, device)
    histogram = metrics.pair_histogram(feats, identities, bins=BINS)
    curve = metrics.roc(histogram)
    negatives = histogram.num_negatives
    resolved = [far for far in FARS if rates.resolved(far, negatives)]
    points = _points(feats, identities, resolved)

    edges = np.concatenate([curve.thresholds.double().numpy(), [p.threshold for p in points]])
    far = np.concatenate([curve.far.numpy(), [p.achieved_far for p in points]])
    tar = np.concatenate([curve.tar.numpy(), [p.tar for p in points]])
    order = np.argsort(edges, kind="stable")
    edges, far, tar = (np.append(v[order], end) for v, end in ((edges, np.inf), (far, 0), (tar, 0)))
    # The highest of several thresholds with the same rates: most bins are empty.
    kept = np.append((np.diff(far) != 0) | (np.diff(tar) != 0), True)
    return Roc(
        thresholds=edges[kept],
        far=far[kept],
        tar=tar[kept],
        positives=histogram.num_positives,
        negatives=negatives,
        at=tuple(points),
        unresolved=tuple(far for far in FARS if far not in resolved),
    )


def _points(feats: torch.Tensor, labels: torch.Tensor, fars: list[float]) -> list[RatePoint]:
    if not fars:
        return []
    found = metrics.tar_at_far(feats, labels, fars)
    columns = (found.tar, found.threshold, found.achieved_far)
    return [RatePoint(*p) for p in zip(fars, *(c.tolist() for c in columns), strict=True)]
