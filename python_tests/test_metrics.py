"""Metrics over all pairs, against brute force on the scores of all pairs."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from helpers import DEVICES, run_python
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import dispatch, metrics
from unitsface_kernels.backends.histogram import Binning
from unitsface_kernels.metrics import order_statistics
from unitsface_kernels.metrics.tiles import Scores

TARGETS = [
    (backend, device)
    for device in DEVICES
    for backend in ("native", "reference")
    if dispatch.unavailable(backend, device, torch.float32) is None
]
each_target = pytest.mark.parametrize(("backend", "device"), TARGETS)
FARS = (0.0, 1e-9, 1e-4, 1e-3, 0.01, 0.1, 0.29, 0.5, 1.0)


def test_the_compiled_backend_is_tested() -> None:
    assert ("native", "cpu") in TARGETS


def signs(n: int, size: int = 16) -> Tensor:
    """Features whose norms and cosines are exact in float32, in whatever order they are added."""
    return torch.randint(0, 2, (n, size)).float() * 2 - 1


def identities(n: int, count: int) -> Tensor:
    return torch.randint(-1, count, (n,))


def clusters(n: int, count: int, size: int = 24, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    labels = identities(n, count)
    return torch.randn(count, size)[labels] + noise * torch.randn(n, size), labels


def kinds(
    cosine: Tensor, labels: Tensor, other_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted scores of the positive and of the negative pairs of a full matrix."""
    columns = labels if other_labels is None else other_labels
    counted = (labels >= 0)[:, None] & (columns >= 0)[None, :]
    if other_labels is None:
        counted &= torch.ones_like(counted).triu(1)
    same = labels[:, None] == columns[None, :]
    return cosine[counted & same].sort().values, cosine[counted & ~same].sort().values


def full_matrix(
    feats: Tensor, other: Tensor | None = None, *, backend: str = "auto", upper: bool = False
) -> Tensor:
    """The scores as the backend computes them; ``upper``: those of unordered pairs."""
    columns = feats if other is None else other
    labels = [torch.zeros(len(t), dtype=torch.int64, device=t.device) for t in (feats, columns)]
    scores = Scores(feats, labels[0], other, None if other is None else labels[1], backend)
    full = torch.full((len(feats), len(columns)), math.nan)
    for tile in scores.tiles(upper=upper):
        full[tile.start : tile.stop, tile.other : tile.end] = tile.cosines.cpu()
    return full


def count_at(sorted_scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many scores are at least each threshold."""
    return len(sorted_scores) - torch.searchsorted(sorted_scores, thresholds, right=False)


# --- scores --------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_cosines(backend: str, device: str, dtype: torch.dtype) -> None:
    feats = torch.randn(70, 33).to(dtype)
    feats[3] = 0
    feats[4] = 1e-3
    got = full_matrix(feats.to(device), backend=backend)
    wide = feats.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-5)
    assert (got - unit @ unit.T).abs().max() < 1e-6


def test_every_pair_is_scored_once() -> None:
    feats, labels = signs(2100, 4), identities(2100, 30)
    upper = full_matrix(feats, upper=True)
    assert not bool(upper[torch.ones_like(upper, dtype=torch.bool).triu()].isnan().any())
    assert bool(upper[2050:, :1024].isnan().all())  # tiles below the diagonal are left out
    histogram = metrics.pair_histogram(feats, labels)
    positive, negative = kinds(upper, labels)
    assert (histogram.num_positives, histogram.num_negatives) == (len(positive), len(negative))


# --- histograms ----------------------------------------------------------------------------------


def check_histogram(histogram, positive: Tensor, negative: Tensor, bins: int) -> None:
    assert histogram.edges.shape == (bins + 1,)
    for counts, scores in ((histogram.positives, positive), (histogram.negatives, negative)):
        place = torch.searchsorted(histogram.edges, scores, right=True)
        assert torch.equal(counts, torch.bincount(place, minlength=bins + 2))


@each_target
@pytest.mark.parametrize("n", [1, 2, 7, 1023, 1025])
def test_pair_histogram(backend: str, device: str, n: int) -> None:
    feats, labels = signs(n), identities(n, n // 5 + 1)
    cosine = (feats @ feats.T) / 16
    histogram = metrics.pair_histogram(
        feats.to(device), labels.to(device), bins=100, backend=backend
    )
    check_histogram(histogram, *kinds(cosine, labels), 100)


@each_target
def test_pair_histogram_against_others(backend: str, device: str) -> None:
    feats, other = signs(40), signs(1100)
    labels, others = identities(40, 6), identities(1100, 9)
    histogram = metrics.pair_histogram(
        feats.to(device),
        labels.to(device),
        other=other.to(device),
        other_labels=others.to(device),
        backend=backend,
    )
    check_histogram(histogram, *kinds(feats @ other.T / 16, labels, others), 4096)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_widened_not_rounded(dtype: torch.dtype) -> None:
    feats, labels = clusters(60, 8)
    narrow = feats.to(dtype)
    backend = "reference" if dtype == torch.float64 else "native"
    got = metrics.kth_largest_score(narrow, labels, [1, 50], backend=backend)
    _, negative = kinds(
        F.normalize(narrow.double(), dim=1) @ F.normalize(narrow.double()).T, labels
    )
    assert (got - negative.flip(0)[[0, 49]]).abs().max() < 5e-7


def test_large_labels_stay_apart() -> None:
    feats = signs(50)
    labels = torch.randint(0, 5, (50,))
    got = metrics.pair_histogram(feats, labels * 2**33 + 7)
    assert torch.equal(got.positives, metrics.pair_histogram(feats, labels).positives)


def test_roc_is_exact_at_its_thresholds() -> None:
    feats, labels = clusters(300, 20)
    curve = metrics.roc(metrics.pair_histogram(feats, labels, bins=64))
    positive, negative = kinds(full_matrix(feats, upper=True), labels)
    assert curve.thresholds[0] == -math.inf
    far = count_at(negative, curve.thresholds).double() / len(negative)
    tar = count_at(positive, curve.thresholds).double() / len(positive)
    assert torch.equal(curve.far, far)
    assert torch.equal(curve.tar, tar)


# --- order statistics ----------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("case", ["random", "ties", "identical", "near zero"])
@pytest.mark.parametrize("of", ["positive", "negative"])
def test_kth_largest_score(backend: str, device: str, case: str, of: str) -> None:
    feats, labels = clusters(150, 9)
    if case == "ties":
        feats = signs(150)
    elif case == "identical":
        feats = feats[:1].expand(150, -1).contiguous()
    elif case == "near zero":
        # Cosines of 1e-9 and less: a bin with hundreds of millions of float32 values.
        feats = torch.eye(150) + 1e-9 * torch.randn(150, 150)
    feats, labels_there = feats.to(device), labels.to(device)
    positive, negative = kinds(full_matrix(feats, backend=backend, upper=True), labels)
    scores = (positive if of == "positive" else negative).flip(0)
    ranks = [1, 2, 17, len(scores) // 2, len(scores) - 1, len(scores), 17]
    got = metrics.kth_largest_score(feats, labels_there, ranks, of=of, backend=backend)
    assert torch.equal(got, scores[torch.tensor(ranks) - 1])


def test_all_ranks_share_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    count = Scores.count

    def counted(*arguments):
        nonlocal passes
        passes += 1
        return count(*arguments)

    monkeypatch.setattr(Scores, "count", counted)
    feats, labels = clusters(400, 20, size=64)
    metrics.tar_at_far(feats, labels)
    assert 2 <= passes <= 4


def test_crowded_bins_and_many_ranges_take_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few, small ranges at a time: the same answer."""
    feats, labels = clusters(120, 7)
    ranks = list(range(1, 200))
    wanted = metrics.kth_largest_score(feats, labels, ranks)
    best = metrics.best_threshold(feats, labels)
    monkeypatch.setattr(order_statistics, "MOST_RANGES", 3)
    monkeypatch.setattr(order_statistics, "SUB_BINS", 24)
    monkeypatch.setattr(order_statistics.ScorePartition.__init__, "__defaults__", (Binning(5),))
    assert torch.equal(metrics.kth_largest_score(feats, labels, ranks), wanted)
    assert metrics.best_threshold(feats, labels).accuracy == best.accuracy


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
    # (rejected, accepted] is a gap between neighbouring scores.
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


# --- what every metric has to say -----------------------------------------------------------------

PAIR_METRICS = {
    "histogram": metrics.pair_histogram,
    "tar_at_far": metrics.tar_at_far,
    "best_threshold": metrics.best_threshold,
    "kth_largest_score": lambda *a, **k: metrics.kth_largest_score(*a, 1, **k),
    "threshold_gap": lambda *a, **k: metrics.threshold_gap(*a, 1.0, 64.0, **k),
    "identity_thresholds": metrics.identity_thresholds,
}
each_metric = pytest.mark.parametrize("metric", PAIR_METRICS.values(), ids=PAIR_METRICS.keys())


@each_metric
@each_target
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_an_error_where_it_counts(metric, backend: str, device: str, value: float) -> None:
    feats, labels = clusters(30, 4)
    labels[:2] = torch.tensor([1, -1])
    feats[1, 3] = value
    metric(feats.to(device), labels.to(device), backend=backend)  # an ignored row
    feats[0, 3] = value
    with pytest.raises(ValueError, match="scores that are NaN"):
        metric(feats.to(device), labels.to(device), backend=backend)


@pytest.mark.parametrize("where", ["feats", "weight", "bias"])
def test_nan_is_an_error_of_classification(where: str) -> None:
    given = {"feats": signs(9, 4), "weight": signs(3, 4), "bias": torch.zeros(3)}
    given["labels"] = torch.arange(9) % 3
    metrics.classification_accuracy(**given)
    given[where].view(-1)[1] = math.nan
    with pytest.raises(ValueError, match="scores that are NaN"):
        metrics.classification_accuracy(**given)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [4, 4, 4, 4], [-1, -1, -1, -1], [2, -1, -1, -1]])
def test_missing_kinds_of_pairs(labels: list[int]) -> None:
    feats, labels = signs(4), torch.tensor(labels)
    histogram = metrics.pair_histogram(feats, labels)
    for metric in (metrics.tar_at_far, metrics.best_threshold):
        with pytest.raises(ValueError, match="at least one positive and one negative pair"):
            metric(feats, labels)
    with pytest.raises(ValueError, match="at least one positive and one negative pair"):
        metrics.roc(histogram)
    thresholds = metrics.identity_thresholds(feats, labels)
    assert len(thresholds.identities) == 0
    assert math.isnan(thresholds.mean)
    assert math.isnan(thresholds.std)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty(rows: int) -> None:
    feats, labels = signs(rows), torch.zeros(rows, dtype=torch.int64)
    histogram = metrics.pair_histogram(feats, labels)
    assert histogram.num_positives == histogram.num_negatives == 0
    assert len(metrics.identity_thresholds(feats, labels).thresholds) == 0
    none = metrics.pair_histogram(
        signs(3), torch.zeros(3, dtype=torch.int64), other=feats[:0], other_labels=labels[:0]
    )
    assert none.num_positives == none.num_negatives == 0


GIVEN = {"feats": torch.ones(4, 3), "labels": torch.tensor([0, 0, 1, 1])}
MISTAKES = [
    ("pair_histogram", {"feats": torch.ones(4)}, ValueError, "feats"),
    ("pair_histogram", {"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
    ("pair_histogram", {"labels": torch.tensor([0, 0, 1, -2])}, ValueError, "labels.*got -2"),
    ("pair_histogram", {"other": torch.ones(2, 3)}, ValueError, "other_labels"),
    ("pair_histogram", {"other_labels": torch.zeros(2)}, ValueError, "other must"),
    (
        "pair_histogram",
        {"other": torch.ones(2, 4), "other_labels": torch.zeros(2).long()},
        ValueError,
        "other must have D = 3",
    ),
    ("pair_histogram", {"bins": 0}, ValueError, "bins must be >= 1"),
    ("pair_histogram", {"bins": 2**20 + 1}, ValueError, "bins must be <="),
    ("pair_histogram", {"bins": 2.0}, TypeError, "bins"),
    ("pair_histogram", {"backend": "triton"}, ValueError, "backend.*native, reference"),
    ("identity_thresholds", {"bins": 2**13}, ValueError, "bins must be <= 4096"),
    ("tar_at_far", {"far": 1.5}, ValueError, r"far must be in \[0, 1\]"),
    ("tar_at_far", {"far": [0.1, math.nan]}, ValueError, "far must be finite"),
    ("tar_at_far", {"far": []}, ValueError, "far must have"),
    ("tar_at_far", {"far": ["a"]}, TypeError, "far must be a float"),
    ("best_threshold", {"accuracy": "top-1"}, ValueError, "accuracy must be one of"),
    ("kth_largest_score", {"ranks": 0}, ValueError, "ranks must be >= 1"),
    ("kth_largest_score", {"ranks": [5]}, ValueError, "ranks must be <= 4, the number of neg"),
    ("kth_largest_score", {"ranks": [1], "of": "all"}, ValueError, "of must be one of"),
    ("threshold_gap", {"b": 1.0, "scale": 0.0}, ValueError, "scale must be > 0"),
    ("threshold_gap", {"b": "1", "scale": 1.0}, TypeError, "b must be a float"),
    ("threshold_gap", {"b": torch.zeros(2), "scale": 1.0}, ValueError, "b must have one"),
    ("classification_accuracy", {"weight": torch.ones(2, 4)}, ValueError, "weight"),
    ("classification_accuracy", {"weight": torch.ones(1, 3)}, ValueError, r"labels.*\[-1, 1\)"),
    (
        "classification_accuracy",
        {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
        ValueError,
        r"bias must have shape \(2,\)",
    ),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), MISTAKES)
def test_mistakes(name: str, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(metrics, name)(**{**GIVEN, **changes})


def test_the_environment_chooses_among_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from unitsface_kernels.metrics.tiles import resolve

    for wanted, got in (("reference", "reference"), ("triton", "native"), ("auto", "native")):
        monkeypatch.setenv("UNITSFACE_BACKEND", wanted)
        assert resolve("auto", "cpu", torch.float32) == got
    monkeypatch.delenv("UNITSFACE_BACKEND")
    assert resolve("auto", "cpu", torch.float64) == "reference"
    with pytest.raises(ValueError, match="cannot run"):
        resolve("native", "cpu", torch.float64)


def test_inputs_stay_as_they_are_and_autocast_changes_nothing() -> None:
    feats, labels = clusters(60, 6)
    kept = feats.clone()
    feats.requires_grad_()
    for backend in ("native", "reference"):
        plain = metrics.best_threshold(feats, labels, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert metrics.best_threshold(feats, labels, backend=backend) == plain
    assert torch.equal(feats, kept)
    transposed = feats.detach().T.contiguous().T
    assert metrics.best_threshold(transposed, labels) == metrics.best_threshold(kept, labels)


def test_threads_do_not_change_a_count() -> None:
    feats, labels = signs(1500), identities(1500, 40)
    answers, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            histogram = metrics.pair_histogram(feats, labels)
            rates = metrics.tar_at_far(feats, labels)
            per_identity = metrics.identity_thresholds(feats, labels).thresholds
            answers.append((histogram.positives, histogram.negatives, rates.tar, per_identity))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*answers, strict=True):
        assert torch.equal(one, two)


MEMORY = """
import torch
from unitsface_kernels import metrics

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) for l in lines if l.startswith(field + ":")) / 1024

torch.manual_seed(0)
warm = torch.randn(64, 16)
metrics.tar_at_far(warm, torch.arange(64) // 4)
feats, labels = torch.randn(20000, 16), torch.arange(20000) // 10
before = status("VmRSS")
metrics.tar_at_far(feats, labels)
metrics.classification_accuracy(feats, feats[::2].clone(), labels)
print(status("VmHWM") - before)
"""


def test_memory_is_bounded() -> None:
    """20 000 features have 200 million pairs, 800 MB of scores."""
    done = run_python("-c", MEMORY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150
