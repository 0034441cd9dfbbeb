"""Rates, thresholds and accuracies over all pairs or classes, against brute force."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from support.metrics import (
    clusters,
    count_at,
    each_target,
    full_matrix,
    identities,
    kinds,
    signs,
)
from torch import Tensor

from unitsface_kernels import metrics

FARS = (0.0, 1e-9, 1e-4, 1e-3, 0.01, 0.1, 0.29, 0.5, 1.0)


# --- verification --------------------------------------------------------------------------------


def brute_tar_at_far(positive: Tensor, negative: Tensor, far: float) -> tuple[float, float, float]:
    """Every threshold that matters: above each score, and below all."""
    scores = torch.cat([positive, negative]).unique()
    above = torch.nextafter(scores, torch.tensor(math.inf))
    thresholds = torch.cat([torch.tensor([-math.inf]), above])
    fars = count_at(negative, thresholds).double() / len(negative)
    tars = count_at(positive, thresholds).double() / len(positive)
    first = int((fars <= far).nonzero()[0])
    return float(tars[first]), float(fars[first]), float(thresholds[first])


@each_target
@pytest.mark.parametrize("ties", [False, True])
def test_tar_at_far(backend: str, device: str, ties: bool) -> None:
    feats, labels = clusters(200, 12)
    if ties:
        feats = signs(200)
        feats[50:90] = feats[10:50]
    feats = feats.to(device)
    got = metrics.tar_at_far(feats, labels.to(device), FARS, backend=backend)
    positive, negative = kinds(full_matrix(feats, backend=backend, upper=True), labels)
    assert (got.num_positives, got.num_negatives) == (len(positive), len(negative))
    for k, far in enumerate(FARS):
        tar, achieved, _ = brute_tar_at_far(positive, negative, far)
        assert (got.tar[k], got.achieved_far[k]) == (tar, achieved), far
        assert got.achieved_far[k] <= far
        # The threshold does what it says, and no smaller one would.
        assert count_at(negative, got.threshold[k]) == round(achieved * len(negative))
        assert count_at(positive, got.threshold[k]) == round(tar * len(positive))
        if got.threshold[k] > -math.inf:
            lower = torch.nextafter(got.threshold[k], torch.tensor(-math.inf))
            assert count_at(negative, lower) / len(negative) > far


def test_rates_count_as_they_are_written() -> None:
    """29 of 100 negatives are 0.29, though 0.29 * 100 is below 29 in floating point."""
    feats = torch.stack([torch.linspace(0.1, 1, 100).cos(), torch.linspace(0.1, 1, 100).sin()], 1)
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.01]])
    got = metrics.tar_at_far(
        torch.cat([rows[:1]]),
        torch.tensor([0]),
        0.29,
        other=torch.cat([feats, rows[1:]]),
        other_labels=torch.tensor([1] * 100 + [0]),
    )
    assert got.achieved_far.tolist() == [0.29]
    assert got.tar.tolist() == [1.0]


# --- thresholds ----------------------------------------------------------------------------------


def brute_best(positive: Tensor, negative: Tensor, kind: str) -> float:
    scores = torch.cat([positive, negative]).unique()
    thresholds = torch.cat([scores, torch.tensor([math.inf])])
    return float(brute_accuracy(positive, negative, thresholds, kind).max())


def brute_accuracy(positive: Tensor, negative: Tensor, thresholds: Tensor, kind: str) -> Tensor:
    tp, fp = count_at(positive, thresholds).double(), count_at(negative, thresholds).double()
    if kind == "plain":
        return (tp + len(negative) - fp) / (len(positive) + len(negative))
    return (tp / len(positive) + 1 - fp / len(negative)) / 2


@each_target
@pytest.mark.parametrize("kind", ["balanced", "plain"])
@pytest.mark.parametrize("case", ["separable", "overlapping", "random", "ties", "inverted"])
def test_best_threshold(backend: str, device: str, kind: str, case: str) -> None:
    noise = {"separable": 0.05, "overlapping": 0.9}.get(case, 3.0)
    feats, labels = clusters(150, 10, noise=noise)
    if case == "ties":
        feats = signs(150, 4)
    if case == "inverted":  # positives score lower than negatives: accept all, or none
        labels = torch.arange(8) // 2
        feats = torch.eye(4).repeat_interleave(2, dim=0)
        feats[1::2] = -feats[1::2]
    feats = feats.to(device)
    got = metrics.best_threshold(feats, labels.to(device), accuracy=kind, backend=backend)
    positive, negative = kinds(full_matrix(feats, backend=backend, upper=True), labels)
    assert got.accuracy == pytest.approx(brute_best(positive, negative, kind), abs=1e-15)
    for value in (got.threshold, got.accepted):
        threshold = torch.tensor([value], dtype=torch.float64)
        accuracy = float(brute_accuracy(positive.double(), negative.double(), threshold, kind))
        assert accuracy == pytest.approx(got.accuracy, abs=1e-15)
    # (rejected, accepted] is a gap between neighboring scores.
    scores = torch.cat([positive, negative])
    assert not bool(((scores > got.rejected) & (scores < got.accepted)).any())
    for end in (got.rejected, got.accepted):
        assert math.isinf(end) or bool((scores == end).any())
    assert got.rejected < got.threshold
    assert got.threshold <= got.accepted
    if case == "separable":
        assert got.accuracy == 1.0
        assert got.threshold == pytest.approx((negative.max() + positive.min()).item() / 2)


def test_balanced_accuracy_where_integers_outgrow_64_bits() -> None:
    from unitsface_kernels.metrics.thresholds import _Objective

    objective = _Objective("balanced", 2**40 + 1, 2**41)
    values = objective(torch.tensor([2**40 + 1, 2**40]), torch.tensor([1, 0]))
    assert values.tolist() == [(2**40 + 1) * (2**41 - 1), 2**40 * 2**41]


@each_target
def test_threshold_gap(backend: str, device: str) -> None:
    feats, labels = (t.to(device) for t in clusters(120, 8))
    best = metrics.best_threshold(feats, labels, backend=backend)
    positive, negative = kinds(full_matrix(feats, backend=backend, upper=True), labels.cpu())
    for b in (12.8, torch.tensor([-3.0], device=device), best.threshold * 64, 1e30, -1e30):
        gap = metrics.threshold_gap(feats, labels, b, 64.0, backend=backend)
        assert gap.best == best
        assert gap.learned == float(b) / 64
        assert gap.gap == gap.learned - best.threshold
        threshold = torch.tensor([gap.learned], dtype=torch.float64)
        wanted = brute_accuracy(positive.double(), negative.double(), threshold, "balanced")
        assert gap.accuracy == pytest.approx(float(wanted), abs=1e-15)
    score = float(positive[3])  # exactly a score: accepted; next above it: not
    for value, count in ((score, 3), (math.nextafter(score, 2), 4)):
        gap = metrics.threshold_gap(feats, labels, value, 1.0, accuracy="plain", backend=backend)
        right = len(positive) - count + int((negative < value).sum())
        assert gap.accuracy == right / (len(positive) + len(negative))


@each_target
@pytest.mark.parametrize("against_others", [False, True])
def test_identity_thresholds(
    backend: str, device: str, against_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitsface_kernels.metrics import identities as module

    monkeypatch.setattr(module, "ROWS", 37)  # identities cross the borders of blocks
    feats, labels = signs(200), identities(200, 12)
    labels[labels == 3] = 40
    labels[0] = 50  # no positive pair
    other, others = (signs(90), identities(90, 11)) if against_others else (feats, labels)
    given = {"other": other.to(device), "other_labels": others.to(device)} if against_others else {}
    got = metrics.identity_thresholds(
        feats.to(device), labels.to(device), bins=64, backend=backend, **given
    )
    cosine = feats @ other.T / 16
    edges = metrics.pair_histogram(feats, labels, bins=64).edges.double()
    cosine = cosine.double()
    wanted = []
    for identity in labels[labels >= 0].unique().tolist():
        rows = labels == identity
        counted = rows[:, None] & (others >= 0)
        if not against_others:
            counted &= ~torch.eye(200, dtype=torch.bool)
        same = others[None, :] == identity
        positive, negative = (cosine[counted & k].sort().values for k in (same, ~same))
        if len(positive) and len(negative):
            accuracy = brute_accuracy(positive, negative, edges, "balanced")
            run = (accuracy == accuracy.max()).tolist()
            first = run.index(True)
            last = first + (run[first:].index(False) if False in run[first:] else len(run[first:]))
            wanted.append((identity, float(edges[first] + edges[last - 1]) / 2, accuracy.max()))
    assert got.identities.tolist() == [w[0] for w in wanted]
    assert 50 not in got.identities
    assert torch.equal(got.thresholds, torch.tensor([w[1] for w in wanted], dtype=torch.float64))
    assert torch.allclose(got.accuracies, torch.stack([w[2] for w in wanted]), rtol=0, atol=1e-15)
    assert got.smallest <= got.mean <= got.largest
    assert got.std == pytest.approx(got.thresholds.numpy().std())


# --- classification ------------------------------------------------------------------------------


def brute_classification(metric: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    kept = labels >= 0
    metric, labels = metric[kept], labels[kept]
    target = metric.gather(1, labels[:, None])[:, 0]
    mine = torch.arange(metric.shape[1])[None, :] == labels[:, None]
    wrong = metric.masked_fill(mine, -math.inf)
    thresholds = target.unique()
    right = (target[None] >= thresholds[:, None]) & (wrong.amax(1)[None] < thresholds[:, None])
    per_class = [right[:, labels == c].sum(1).max() for c in labels.unique()]
    count = len(labels)
    return (
        int((target > wrong.amax(1)).sum()) / count,
        int((target > wrong.amax(0)[labels]).sum()) / count,
        int(torch.stack(per_class).sum()) / count,
        int(right.sum(1).max()) / count,
    )


@each_target
@pytest.mark.parametrize("bias", [None, 0.3, "per class"])
@pytest.mark.parametrize("classes", [1, 2, 7, 1100])
@pytest.mark.parametrize("exact", [False, True])
def test_classification_accuracy(
    backend: str, device: str, bias, classes: int, exact: bool
) -> None:
    labels = identities(300, min(classes, 40))
    weight = signs(classes) if exact else torch.randn(classes, 16)
    feats = signs(300) if exact else weight[labels] + 0.6 * torch.randn(300, 16)
    if bias == "per class":
        bias = torch.randint(-4, 5, (classes,)).float() / 16
    scale = 4.0 if bias is not None else 1.0
    there = None if not isinstance(bias, Tensor) else bias.to(device)
    got = metrics.classification_accuracy(
        feats.to(device),
        weight.to(device),
        labels.to(device),
        bias=bias if there is None else there,
        scale=scale,
        backend=backend,
    )
    cosine = full_matrix(feats.to(device), weight.to(device), backend=backend)
    metric = cosine * scale - (0.0 if bias is None else bias)
    wanted = brute_classification(metric, labels)
    assert (got.sample_wise, got.class_wise, got.class_uniform, got.uniform) == wanted
    assert got.uniform <= got.class_uniform <= got.sample_wise
    assert got.samples == int((labels >= 0).sum())
    if got.uniform == 0.0:
        assert math.isnan(got.threshold)
        return
    # Uniformly right at the threshold, and anywhere in (below, at_most].
    kept = labels >= 0
    target = metric[kept].gather(1, labels[kept][:, None])[:, 0].double()
    wrong = metric[kept].scatter(1, labels[kept][:, None], -math.inf).amax(1).double()
    for t in (got.threshold, got.at_most):
        assert int(((target >= t) & (wrong < t)).sum()) / got.samples == got.uniform
    assert got.below < got.threshold
    assert got.threshold <= got.at_most


def test_classification_without_samples() -> None:
    got = metrics.classification_accuracy(torch.zeros(3, 4), signs(2, 4), torch.full((3,), -1))
    assert got.samples == 0
    assert all(math.isnan(v) for v in astuple(got)[:7])
