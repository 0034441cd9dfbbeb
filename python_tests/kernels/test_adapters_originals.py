"""Adapted losses against pytorch-metric-learning: labels of all kinds, memories, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.compiled import without_compiler
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor, nn

from unitsface_kernels.adapters import metric_learning as ours

theirs = pytest.importorskip(
    "pytorch_metric_learning.losses",
    reason="pytorch-metric-learning is not installed; `make env` installs it",
)
from pytorch_metric_learning import distances, miners  # noqa: E402

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss")
ALL_PAIR_LOSSES = (*PAIR_LOSSES, "NTXentLoss", "SupConLoss")
CLASS_LOSSES = {
    "CosFaceLoss": {},
    "ArcFaceLoss": {"margin": 40, "scale": 8},
    "SubCenterArcFaceLoss": {"margin": 20, "scale": 8, "sub_centers": 2},
    "SphereFaceLoss": {"margin": 3},
    "LargeMarginSoftmaxLoss": {"margin": 2},
    "NormalizedSoftmaxLoss": {"temperature": 0.2},
    "ProxyAnchorLoss": {"alpha": 5},
    "ProxyNCALoss": {"softmax_scale": 4},
}


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    with without_compiler():
        yield


def _check(mine: Any, original: Any, tensors: list[Tensor], call: Any) -> None:
    """Loss and gradients of tensors and weights; the original computes in float64."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    loss, want = call(mine, *leaves), call(original.double(), *exact)
    check_same("loss", loss.detach(), want.detach(), SAME_LOSS)
    sides = [[*leaves, *mine.parameters()], [*exact, *original.parameters()]]
    found = [
        torch.autograd.grad(value, side, allow_unused=True)
        for value, side in zip((loss, want), sides, strict=True)
    ]
    for got, expected in zip(*found, strict=True):
        check_same("gradient", _or_zero(got), _or_zero(expected), SAME_GRADIENT)


def _or_zero(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None or not bool(gradient.any()) else gradient


LABELS = {
    "random": [2, 0, -1, 1, 2, 2, -1, 0, -7, 1, 2, 0],
    "no_positives": list(range(-4, 4)),
    "no_negatives": [7] * 6,
    "one_anchor_without_negatives_is_none": [3, 3, 3, 4],
    "one_sample": [0],
    "two_of_one": [-1, -1],
    "two_of_two": [0, 1],
}
AGAINST = {
    "random": ([2, 0, -1, 1, 2, 2], [1, -1, 2, 2, 0, 5, -1, 2]),
    "disjoint": ([0, 1, 2], [3, 4, -5, 6]),
    "no_negatives": ([4, 4], [4, 4, 4]),
    "one_pair_of_either_kind": ([0], [0, 1]),
    "two_positive_pairs": ([0], [0, 1, 0]),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_in_batch(name: str, labels: list[int]) -> None:
    mine, original = getattr(ours, name)(), getattr(theirs, name)()
    embeddings = [torch.randn(len(labels), 8)]
    _check(mine, original, embeddings, lambda loss, e: loss(e, torch.tensor(labels)))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("labels", AGAINST.values(), ids=AGAINST)
def test_with_reference(name: str, labels: tuple[list[int], list[int]]) -> None:
    rows, columns = (torch.tensor(some) for some in labels)
    mine, original = getattr(ours, name)(), getattr(theirs, name)()
    tensors = [torch.randn(len(some), 8) for some in labels]
    _check(mine, original, tensors, lambda loss, e, r: loss(e, rows, ref_emb=r, ref_labels=columns))


@pytest.mark.parametrize("name", sorted({*ALL_PAIR_LOSSES} - {"CircleLoss"}))
@pytest.mark.parametrize(
    "distance",
    [
        distances.CosineSimilarity(),
        distances.DotProductSimilarity(normalize_embeddings=False),
        distances.LpDistance(),
        distances.LpDistance(power=2),
        distances.LpDistance(normalize_embeddings=False, power=1.5),
    ],
    ids=["cosine", "inner", "distance", "squared", "raw"],
)
def test_distances(name: str, distance: nn.Module) -> None:
    mine, original = (getattr(library, name)(distance=distance) for library in (ours, theirs))
    labels = torch.arange(14) % 4
    embeddings = [torch.randn(14, 8) * torch.linspace(0.3, 1.2, 14)[:, None]]
    _check(mine, original, embeddings, lambda loss, e: loss(e, labels))


@pytest.mark.parametrize("name", ALL_PAIR_LOSSES)
@pytest.mark.parametrize(
    "miner",
    [
        miners.MultiSimilarityMiner(0.3),
        miners.TripletMarginMiner(0.2),
        miners.PairMarginMiner(pos_margin=0.8, neg_margin=0.9),
    ],
    ids=lambda miner: type(miner).__name__,
)
def test_miners(name: str, miner: nn.Module) -> None:
    embeddings, labels = torch.randn(24, 8), torch.arange(24) % 4
    lists = miner(embeddings, labels)
    assert all(len(each) > 1 for each in lists)
    _check(
        getattr(ours, name)(),
        getattr(theirs, name)(),
        [embeddings],
        lambda loss, e: loss(e, None, lists),
    )


@pytest.mark.parametrize("name", ALL_PAIR_LOSSES)
@pytest.mark.parametrize("library", [ours, theirs], ids=["our_memory", "their_memory"])
@pytest.mark.parametrize("mined", [False, True], ids=["all", "mined"])
def test_our_losses_in_either_memory(name: str, library: Any, mined: bool) -> None:
    miner = miners.MultiSimilarityMiner(0.2) if mined else None
    mine = library.CrossBatchMemory(getattr(ours, name)(), 8, 24, miner=miner)
    original = theirs.CrossBatchMemory(getattr(theirs, name)(), 8, 24, miner=miner)
    for size in (10, 10, 7, 10):
        labels = torch.randint(0, 4, (size,))
        embeddings = [torch.randn(size, 8)]
        _check(mine, original, embeddings, lambda loss, e, y=labels: loss(e, y))
    assert mine.queue_idx == original.queue_idx


@pytest.mark.parametrize("miner", [None, miners.TripletMarginMiner(0.2)], ids=["all", "mined"])
def test_their_losses_in_our_memory(miner: nn.Module | None) -> None:
    memories = [
        library.CrossBatchMemory(theirs.TripletMarginLoss(), 8, 24, miner=miner)
        for library in (ours, theirs)
    ]
    for _ in range(4):
        embeddings, labels = torch.randn(10, 8), torch.randint(0, 4, (10,))
        got, want = (memory(embeddings, labels) for memory in memories)
        check_same("loss", got, want, SAME_LOSS)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_classes(name: str) -> None:
    sizes = {"num_classes": 6, "embedding_size": 8, **CLASS_LOSSES[name]}
    mine, original = getattr(ours, name)(**sizes), getattr(theirs, name)(**sizes)
    original.load_state_dict(mine.state_dict())
    mine.load_state_dict(original.state_dict())
    labels = torch.randint(0, 5, (20,))
    embeddings = torch.randn(20, 8)
    _check(mine, original, [embeddings], lambda loss, e: loss(e, labels))
    lists = miners.TripletMarginMiner(0.3)(embeddings, labels)
    _check(mine, original, [embeddings], lambda loss, e: loss(e, labels, lists))
    for method in ("get_logits", "get_cosine"):
        if hasattr(original, method):
            want = getattr(original, method)(embeddings.double())
            got = getattr(mine, method)(embeddings)
            check_same(method, got.detach(), want.detach(), SAME_LOSS)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_weights_start_alike(name: str) -> None:
    drawn = []
    for library in (ours, theirs):
        torch.manual_seed(5)
        drawn.append(getattr(library, name)(num_classes=6, embedding_size=8))
    (got,), (want,) = (loss.parameters() for loss in drawn)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", [*ALL_PAIR_LOSSES, *CLASS_LOSSES])
def test_float64(name: str) -> None:
    sizes = {} if name in ALL_PAIR_LOSSES else {"num_classes": 4, "embedding_size": 8}
    mine, original = (getattr(library, name)(**sizes) for library in (ours, theirs))
    original.load_state_dict(mine.state_dict())
    embeddings, labels = torch.randn(20, 8, dtype=torch.float64), torch.arange(20) % 4
    got, want = mine(embeddings, labels), original.double()(embeddings, labels)
    assert got.dtype == torch.float64
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-9)


def test_samples_far_from_their_dominant_center() -> None:
    sizes = {"num_classes": 4, "embedding_size": 8, "sub_centers": 3}
    mine, original = (library.SubCenterArcFaceLoss(**sizes) for library in (ours, theirs))
    original.load_state_dict(mine.state_dict())
    embeddings, labels = torch.randn(60, 8), torch.arange(60) % 4
    outliers, centers = mine.get_outliers(embeddings, labels, threshold=80)
    want, of_original = original.get_outliers(embeddings, labels, threshold=80)
    assert 0 < len(outliers) < 60
    assert torch.equal(outliers, want)
    assert torch.equal(centers, of_original)
