"""Scores, histograms and order statistics over all pairs, against brute force; every mistake."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import run_python
from support.metrics import (
    TARGETS,
    clusters,
    count_at,
    each_target,
    full_matrix,
    identities,
    kinds,
    signs,
)
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import dispatch, metrics
from unitsface_kernels.backends.histogram import Binning, ReferenceScores
from unitsface_kernels.metrics import order_statistics
from unitsface_kernels.metrics.tiles import Scores


def test_the_compiled_backend_is_tested() -> None:
    assert ("native", "cpu") in TARGETS


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
    ranks = list(range(1, 40))
    wanted = metrics.kth_largest_score(feats, labels, ranks)
    best = metrics.best_threshold(feats, labels)
    monkeypatch.setattr(order_statistics, "MOST_RANGES", 3)
    monkeypatch.setattr(order_statistics, "SUB_BINS", 96)
    monkeypatch.setattr(order_statistics.ScorePartition.__init__, "__defaults__", (Binning(40),))
    assert torch.equal(metrics.kth_largest_score(feats, labels, ranks), wanted)
    assert metrics.best_threshold(feats, labels).accuracy == best.accuracy


# --- all metrics ----------------------------------------------------------------------------------

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
    def resolve(backend: str, device: str, dtype: torch.dtype) -> str:
        engine = dispatch.score_engine(backend, torch.device(device), dtype)
        return "reference" if isinstance(engine, ReferenceScores) else "native"

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
