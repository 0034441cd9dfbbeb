"""Metrics over all pairs, drawn, between the float64 scores moved up and moved down."""

from __future__ import annotations

import torch
from torch import Tensor

from unitsface_kernels import metrics
from unitsface_kernels.backends.reference import cosines

from . import draw
from .draw import Source

#: Error of a score: of a float32 GEMM, and of unit rows.
ERROR = 2e-6


def _scores(feats: Tensor, labels: Tensor, other: Tensor | None, other_labels: Tensor | None):
    """Float64 scores of positive and of negative pairs."""
    columns = feats if other is None else other
    column_labels = (labels if other_labels is None else other_labels).to(torch.int64)
    labels = labels.to(torch.int64)
    cosine = cosines(feats.double(), columns.double())
    counted = (labels >= 0)[:, None] & (column_labels >= 0)[None, :]
    if other is None:
        counted &= torch.ones_like(counted).triu(1)
    same = labels[:, None] == column_labels[None, :]
    return cosine[counted & same], cosine[counted & ~same]


def _at_least(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Fewest and most scores that may be counted at or above each threshold."""
    thresholds = thresholds.double()[:, None]
    return tuple((scores >= thresholds + move).sum(dim=1) for move in (ERROR, -ERROR))


def _outside(name: str, got: Tensor, low: Tensor, high: Tensor) -> str | None:
    if bool(((got >= low) & (got <= high)).all()):
        return None
    return f"{name}: {got.tolist()[:8]} not in {low.tolist()[:8]} ... {high.tolist()[:8]}"


def run_one(seed: int) -> str | None:
    s = Source(seed)
    torch.set_num_threads(s.pick([1, 1, 2]))
    dtype, width = s.pick(draw.DTYPES), s.pick(draw.WIDTHS)
    large = s.chance(0.01)
    rows, columns = (1100, 1050) if large else (s.pick(draw.ROWS), s.pick(draw.ROWS))
    identities = s.pick([1, 2, 5, 20])
    feats = draw.features(s, rows, width, dtype, None)
    labels = draw.labels(s, rows, identities, wide=True)
    more: dict[str, Tensor] = {}
    if s.chance(0.5):
        more["other"] = draw.features(s, columns, width, dtype, feats)
        more["other_labels"] = draw.labels(s, columns, identities, wide=True)
    positive, negative = _scores(feats, labels, *(more.get(k) for k in ("other", "other_labels")))
    more = {name: draw.laid_out(s, t) for name, t in more.items()}
    arguments = (draw.laid_out(s, feats), draw.laid_out(s, labels))
    backend = s.pick(["auto", "auto", "native" if dtype != torch.float64 else "auto", "reference"])
    more["backend"] = backend
    bins = s.pick([1, 7, 4096])
    if not bool(torch.cat([positive, negative]).isfinite().all()):
        try:
            metrics.pair_histogram(*arguments, bins=bins, **more)
        except ValueError:
            return None
        return "no error for scores that are NaN"
    histogram = metrics.pair_histogram(*arguments, bins=bins, **more)
    for name, counts, scores in (
        ("positives", histogram.positives, positive),
        ("negatives", histogram.negatives, negative),
    ):
        if int(counts.sum()) != len(scores):
            return f"{name}: {int(counts.sum())} pairs instead of {len(scores)}"
        edges = histogram.edges if bins < 100 else histogram.edges[::97]
        above = counts.flip(0).cumsum(0).flip(0)[1:]
        problem = _outside(name, above if bins < 100 else above[::97], *_at_least(scores, edges))
        if problem is not None:
            return problem
    for of, scores in (("positive", positive), ("negative", negative)):
        if not len(scores):
            continue
        rank = s.random.randrange(1, len(scores) + 1)
        got = metrics.kth_largest_score(*arguments, rank, of=of, **more).double()
        want = scores.sort(descending=True).values[rank - 1]
        if not abs(float(got - want)) <= ERROR:
            return f"score {rank} of {of}: {float(got)} instead of {float(want)}"
    if not len(positive) or not len(negative):
        return None
    rates = [0.0, 0.5 / len(negative), s.random.random(), 1.0]
    found = metrics.tar_at_far(*arguments, rates, **more)
    if bool((found.achieved_far > found.far).any()):
        return f"rates {found.achieved_far.tolist()} above {rates}"
    accepted = _at_least(positive, found.threshold.clamp(-2, 2))
    problem = _outside("accepted", (found.tar * len(positive)).round(), *accepted)
    best = metrics.best_threshold(*arguments, **more)
    if problem is None and not 0.5 <= best.accuracy <= 1.0:
        return f"best accuracy {best.accuracy}"
    at = [_at_least(x, torch.tensor([best.threshold])) for x in (positive, negative)]
    high = (float(at[0][1]) / len(positive) + 1 - float(at[1][0]) / len(negative)) / 2
    low = (float(at[0][0]) / len(positive) + 1 - float(at[1][1]) / len(negative)) / 2
    if problem is None and not low - 1e-9 <= best.accuracy <= high + 1e-9:
        return f"best accuracy {best.accuracy} not in {low} ... {high}"
    return problem
