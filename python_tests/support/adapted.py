"""Losses of pytorch-metric-learning over listed pairs, written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unitsface_kernels.adapters import metric_learning as ours

Lists = tuple[Tensor, ...]


def stand_in(name: str, power: float = 1.0, normalize: bool = True, p: float = 2) -> object:
    """An object with the attributes of the original's distances."""
    kind = type(name, (), {})()
    kind.p, kind.power, kind.normalize_embeddings = p, power, normalize
    return kind


def similarities(x: Tensor, y: Tensor, distance: object | None) -> Tensor:
    """Larger for nearer pairs."""
    if distance is None or distance.normalize_embeddings:
        x, y = F.normalize(x), F.normalize(y)
    if distance is None or type(distance).__name__ != "LpDistance":
        return x @ y.T
    squared = (x[:, None] - y[None]).square().sum(-1)
    # The root of 0 has no gradient.
    return -(torch.where(squared > 0, squared, 1.0).sqrt() ** distance.power * (squared > 0))


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def ntxent(t: Tensor, lists: Lists) -> Tensor:
    """T = 0.5; a pair that is listed twice counts twice."""
    a, p, b, n = lists
    terms = []
    for i, j in zip(a.tolist(), p.tolist(), strict=True):
        of_row = torch.stack([t[i, j], *t[b[b == i], n[b == i]]]) / 0.5
        terms.append(of_row.logsumexp(0) - of_row[0])
    return torch.stack(terms).mean()


def _of_rows(t: Tensor, lists: Lists) -> list[tuple[Tensor, Tensor]]:
    """Similarities of every row's positives and negatives, each pair once."""
    found = []
    for i in range(len(t)):
        a, p, b, n = lists
        own = sorted(set(p[a == i].tolist()))
        found.append((t[i, own], t[i, sorted(set(n[b == i].tolist()))]))
    return found


def _supcon(t: Tensor, lists: Lists) -> Tensor:
    terms = []
    for own, other in _of_rows(t / 0.5, lists):
        if len(own) and len(own) + len(other) > 1:
            terms.append(torch.cat([own, other]).logsumexp(0) - own.mean())
    return torch.stack(terms).mean()


def _multi_similarity(t: Tensor, lists: Lists, sign: float = 1.0) -> Tensor:
    alpha, beta, base = 2.0, 10.0, sign * 0.3
    terms = []
    for own, other in _of_rows(t, lists):
        positive = torch.log1p(torch.exp(alpha * (base - own)).sum()) / alpha
        terms.append(positive + torch.log1p(torch.exp(beta * (other - base)).sum()) / beta)
    return torch.stack(terms).mean()


def _circle(t: Tensor, lists: Lists) -> Tensor:
    m, gamma = 0.3, 8.0
    terms = []
    for own, other in _of_rows(t, lists):
        if len(own) and len(other):
            p = -gamma * (1 + m - own).relu().detach() * (own - 1 + m)
            n = gamma * (other + m).relu().detach() * (other - m)
            terms.append(_softplus(p.logsumexp(0) + n.logsumexp(0)))
    return torch.stack(terms).mean()


def _contrastive(t: Tensor, lists: Lists, sign: float = -1.0) -> Tensor:
    a, p, b, n = lists
    total = torch.zeros((), dtype=t.dtype)
    for hinges in (
        (sign * 0.2 - t[a, p]).relu(),
        (t[b, n] - sign * (0.9 if sign < 0 else 0.1)).relu(),
    ):
        if bool((hinges > 0).any()):
            total = total + hinges[hinges > 0].mean()
    return total


Formula = Callable[[Tensor, Lists], Tensor]
#: Loss, its distance and what it computes.
LOSSES: dict[str, tuple[Callable[..., torch.nn.Module], object | None, Formula]] = {
    "ntxent": (lambda **k: ours.NTXentLoss(0.5, **k), None, ntxent),
    "supcon": (lambda **k: ours.SupConLoss(0.5, **k), None, _supcon),
    "multi_similarity": (
        lambda **k: ours.MultiSimilarityLoss(2, 10, 0.3, **k),
        None,
        _multi_similarity,
    ),
    "circle": (lambda **k: ours.CircleLoss(0.3, 8, **k), None, _circle),
    "contrastive": (
        lambda **k: ours.ContrastiveLoss(0.2, 0.9, **k),
        stand_in("LpDistance"),
        _contrastive,
    ),
}
MEASURES = {
    "inner_products": stand_in("DotProductSimilarity", normalize=False),
    "euclidean": stand_in("LpDistance"),
    "squared": stand_in("LpDistance", power=2),
    "raw_distances": stand_in("LpDistance", normalize=False),
}
MEASURED: dict[str, tuple[Callable[..., torch.nn.Module], object | None, Formula]] = {
    f"{name}-{measure}": (LOSSES[name][0], distance, LOSSES[name][2])
    for name in ("ntxent", "supcon")
    for measure, distance in MEASURES.items()
}
MEASURED |= {
    "multi_similarity-euclidean": (
        LOSSES["multi_similarity"][0],
        MEASURES["euclidean"],
        lambda t, lists: _multi_similarity(t, lists, -1.0),
    ),
    "multi_similarity-inner_products": (
        LOSSES["multi_similarity"][0],
        MEASURES["inner_products"],
        _multi_similarity,
    ),
    "contrastive-cosine": (
        lambda **k: ours.ContrastiveLoss(0.2, 0.1, **k),
        stand_in("CosineSimilarity"),
        lambda t, lists: _contrastive(t, lists, 1.0),
    ),
    "contrastive-squared": (
        LOSSES["contrastive"][0],
        MEASURES["squared"],
        _contrastive,
    ),
}
ALL = {**LOSSES, **MEASURED}
