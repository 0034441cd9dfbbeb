"""Distances, reducers, regularizers and dtypes of the adapters, against formulas in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiled import without_compiler
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor, nn

from unitsface_kernels.adapters import metric_learning as ours


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    with without_compiler():
        yield


class _Reducer(nn.Module):
    """Keeps what it is given."""

    def forward(self, losses: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor):
        self.given = losses
        return sum(
            (entry["losses"] * 1.0).sum() if isinstance(entry["losses"], Tensor) else 0.0
            for entry in losses.values()
        )


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 8), torch.tensor([2, 0, -1, 1, 2, 2, -1, 0, -7, 1, 2, 0])


def _masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings.double())
    return unit @ unit.T


def test_reducers_get_a_loss_for_every_row() -> None:
    embeddings, labels = _batch()
    for make in (
        ours.SupConLoss,
        ours.MultiSimilarityLoss,
        ours.CircleLoss,
        lambda **k: ours.CosFaceLoss(3, 8, **k),
        lambda **k: ours.ProxyNCALoss(3, 8, **k),
    ):
        reducer = _Reducer()
        loss = make(reducer=reducer)
        total = loss(embeddings, labels % 3)
        (entry,) = loss.reducer.given.values()
        assert list(loss.reducer.given) == ["loss"]
        assert entry["reduction_type"] == "element"
        assert entry["indices"].tolist() == list(range(12))
        assert entry["losses"].shape == (12,)
        check_same("loss", total, entry["losses"].sum(), SAME_LOSS)


def test_reducers_get_a_loss_for_every_pair() -> None:
    embeddings, labels = _batch()
    cosines = _cosines(embeddings)
    own, other = _masks(labels)
    loss = ours.NTXentLoss(0.5, reducer=_Reducer())
    loss(embeddings, labels)
    entry = loss.reducer.given["loss"]
    assert entry["reduction_type"] == "pos_pair"
    assert torch.equal(torch.stack(entry["indices"]), torch.stack(torch.where(own)))
    negatives = (cosines / 0.5).masked_fill(~other, -math.inf).logsumexp(1)
    want = F.softplus(negatives[:, None] - cosines / 0.5)[own]
    check_same("losses", entry["losses"], want, SAME_LOSS)
    contrastive = ours.ContrastiveLoss(0.1, 0.9, reducer=_Reducer())
    contrastive(embeddings, labels)
    distances = (2 - 2 * cosines).clamp(min=0).sqrt()
    parts = contrastive.reducer.reducers
    for name, mask, hinges in (
        ("pos_loss", own, (distances - 0.1).relu()),
        ("neg_loss", other, (0.9 - distances).relu()),
    ):
        entry = parts[name].given[name]
        assert entry["reduction_type"] == name[:3] + "_pair"
        assert torch.equal(torch.stack(entry["indices"]), torch.stack(torch.where(mask)))
        check_same(name, entry["losses"], hinges[mask], SAME_LOSS)


def test_proxy_anchor_gives_both_parts_of_every_proxy() -> None:
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 0])
    loss = ours.ProxyAnchorLoss(5, 8, margin=0.2, alpha=5, reducer=_Reducer())
    total = loss(embeddings, labels)
    unit = F.normalize(loss.proxies.detach().double())
    cosines = unit @ F.normalize(embeddings.double()).T
    own = labels == torch.arange(5)[:, None]
    entries = {name: loss.reducer.reducers[name].given[name] for name in loss.parts}
    positive = (torch.exp(-5 * (cosines - 0.2)) * own).sum(1).log1p()
    negative = (torch.exp(5 * (cosines + 0.2)) * ~own).sum(1).log1p()
    check_same("pos_loss", entries["pos_loss"]["losses"].detach(), positive, SAME_LOSS)
    check_same("neg_loss", entries["neg_loss"]["losses"].detach(), negative, SAME_LOSS)
    assert [entry["divisor"] for entry in entries.values()] == [3, 5]
    check_same("sum", total.detach(), positive.sum() + negative.sum(), SAME_LOSS)
    plain = ours.ProxyAnchorLoss(5, 8, margin=0.2, alpha=5)
    plain.load_state_dict(loss.state_dict())
    want = positive.sum() / 3 + negative.sum() / 5
    check_same("default", plain(embeddings, labels).detach(), want, SAME_LOSS)


# --- the original's reducers ---------------------------------------------------------------------


def _reducers() -> dict[str, Any]:
    found = pytest.importorskip(
        "pytorch_metric_learning.reducers",
        reason="pytorch-metric-learning is not installed; `make env` installs it",
    )
    return {
        "mean": found.MeanReducer(),
        "sum": found.SumReducer(),
        "non_zero": found.AvgNonZeroReducer(),
        "low": found.ThresholdReducer(low=0.3),
        "high": found.ThresholdReducer(high=1.0),
        "between": found.ThresholdReducer(low=0.05, high=0.9),
        "per_anchor": found.PerAnchorReducer(),
        "per_anchor_non_zero": found.PerAnchorReducer(found.AvgNonZeroReducer()),
        "per_anchor_sum": found.PerAnchorReducer(
            aggregation_func=lambda losses, count: losses.sum(dim=1)
        ),
        "classes": found.ClassWeightedReducer(torch.tensor([0.5, 1.0, 2.0, 1.5])),
        "multiple": found.MultipleReducers(
            {"pos_loss": found.MeanReducer(), "loss": found.SumReducer()}, found.SumReducer()
        ),
        "multiple_anchors": found.MultipleReducers(
            {"pos_loss": found.PerAnchorReducer()}, found.MeanReducer()
        ),
    }


REDUCERS = (
    *("mean", "sum", "non_zero", "low", "high", "between", "per_anchor", "per_anchor_non_zero"),
    *("per_anchor_sum", "classes", "multiple", "multiple_anchors"),
)
REDUCED = ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss")
REDUCED_CLASSES = ("CosFaceLoss", "ProxyNCALoss")


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", [*REDUCED, *REDUCED_CLASSES])
def test_reducers_of_the_original(name: str, reducer: str) -> None:
    given = _reducers()[reducer]
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    if reducer == "classes" and name in ("MultiSimilarityLoss", "CircleLoss"):
        pytest.skip("losses of (N, 1), which the original multiplies by (N,) weights")
    sizes = (4, 8) if name in REDUCED_CLASSES else ()
    mine, original = (getattr(library, name)(*sizes, reducer=given) for library in (ours, theirs))
    original.load_state_dict(mine.state_dict(), strict=False)
    embeddings, labels = torch.randn(20, 8), torch.arange(20) % 4
    leaf, exact = embeddings.clone().requires_grad_(), embeddings.double().requires_grad_()
    loss, want = mine(leaf, labels), original(exact, labels)
    check_same("loss", loss.detach(), want.detach(), SAME_LOSS)
    if want.requires_grad:
        gradients = [torch.autograd.grad(t, e)[0] for t, e in ((loss, leaf), (want, exact))]
        check_same("gradient", *gradients, SAME_GRADIENT)


@pytest.mark.parametrize("name", REDUCED)
def test_nothing_is_reduced(name: str) -> None:
    """DoNothingReducer: a loss per row, or per pair, with its places."""
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, labels = torch.randn(20, 8), torch.arange(20) % 4
    found = [
        getattr(library, name)(reducer=reducers.DoNothingReducer())(e, labels)
        for library, e in ((ours, embeddings), (theirs, embeddings.double()))
    ]
    assert found[0].keys() == found[1].keys()
    for part, got in found[0].items():
        want = found[1][part]
        assert got["reduction_type"] == want["reduction_type"]
        check_same(part, got["losses"], want["losses"].reshape(-1), SAME_LOSS)
        if isinstance(want["indices"], tuple):
            assert torch.equal(torch.stack(got["indices"]), torch.stack(want["indices"]))
    few = torch.arange(4)
    assert getattr(ours, name)()(torch.randn(4, 8), few) * 0 == 0


def test_no_rows_are_no_loss() -> None:
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    rows, labels = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    for reducer in (reducers.MeanReducer(), reducers.PerAnchorReducer()):
        for loss in (ours.SupConLoss(reducer=reducer), ours.CosFaceLoss(3, 8, reducer=reducer)):
            assert loss(rows, labels).item() == 0.0


def test_a_divisor_is_that_of_proxy_anchor() -> None:
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    reducer = reducers.DivisorReducer()
    for make in (ours.NTXentLoss, lambda **k: ours.CosFaceLoss(3, 8, **k)):
        with pytest.raises(ValueError, match="got DivisorReducer: this loss has no divisor"):
            make(reducer=reducer)
    assert ours.ProxyAnchorLoss(3, 8, reducer=reducer).reducer is not reducer


def test_reducers_are_modules() -> None:
    with pytest.raises(TypeError, match="reducer must be a reducer of pytorch-metric-learning"):
        ours.NTXentLoss(reducer=object())


# --- regularizers --------------------------------------------------------------------------------


def test_regularizers_are_added() -> None:
    embeddings, labels = torch.randn(6, 8, requires_grad=True), torch.arange(6) % 3
    options = {
        "embedding_regularizer": lambda e: e.square().mean(),
        "embedding_reg_weight": 0.5,
        "weight_regularizer": lambda w: w[:, 0].square().sum(),
        "weight_reg_weight": 0.25,
    }
    for cls in (ours.CosFaceLoss, ours.ProxyAnchorLoss):
        loss = cls(3, 8, **options)
        plain = cls(3, 8)
        plain.load_state_dict(loss.state_dict())
        weights = loss.W.t() if cls is ours.CosFaceLoss else loss.proxies
        want = plain(embeddings, labels) + 0.5 * embeddings.square().mean()
        want = want + 0.25 * weights[:, 0].square().sum()
        got = loss(embeddings, labels)
        check_same("loss", got.detach(), want.detach(), SAME_LOSS)
        of_both = [torch.autograd.grad(each, embeddings)[0] for each in (got, want)]
        check_same("gradient", *of_both, SAME_GRADIENT)
    pairs = ours.NTXentLoss(embedding_regularizer=lambda e: e.abs().sum())
    want = ours.NTXentLoss()(embeddings, labels) + embeddings.abs().sum()
    check_same("loss", pairs(embeddings, labels).detach(), want.detach(), SAME_LOSS)
    reducer, calls = _Reducer(), []
    once = ours.NTXentLoss(
        reducer=reducer, embedding_regularizer=lambda e: calls.append(e) or e.abs().sum()
    )
    once(embeddings, labels)
    assert len(calls) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_regularizer'"):
        ours.NTXentLoss(weight_regularizer=print)


# --- dtypes --------------------------------------------------------------------------------------

EVERY = {
    **{name: getattr(ours, name) for name in REDUCED},
    **{
        name: functools.partial(getattr(ours, name), 3, 8)
        for name in ours.__all__
        if name not in (*REDUCED, "CrossBatchMemory")
    },
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_losses_have_the_dtype_of_the_embeddings(name: str, dtype: torch.dtype) -> None:
    """As in the original; computed in float32 from half precision, which rounds once."""
    loss = EVERY[name]()
    embeddings, labels = torch.randn(12, 8).to(dtype).requires_grad_(), torch.arange(12) % 3
    got = loss(embeddings, labels)
    exact = EVERY[name]().double()
    exact.load_state_dict(loss.state_dict())
    leaf = embeddings.detach().double().requires_grad_()
    want = exact(leaf, labels)
    assert got.dtype == dtype
    assert want.dtype == torch.float64
    error = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float64: 1e-6}[dtype]
    assert float(got) == pytest.approx(float(want), rel=error, abs=error)
    got.backward()
    want.backward()
    assert embeddings.grad.dtype == dtype
    difference = (embeddings.grad.double() - leaf.grad).norm() / leaf.grad.norm()
    # Rounding may change which of a class's centers is the nearest.
    assert difference < 5 * error or name == "SubCenterArcFaceLoss"
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(embeddings.detach(), labels).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", sorted(EVERY.keys() - set(REDUCED)))
def test_weights_are_cast_where_asked(name: str) -> None:
    embeddings, labels = torch.randn(12, 8).half(), torch.arange(12) % 3
    for cast, expected in ((False, torch.float32), (True, torch.float16)):
        loss = EVERY[name](cast_weights=cast)
        (weight,) = loss.parameters()
        with torch.autocast("cpu", torch.bfloat16):
            loss(embeddings, labels)
        assert weight.dtype == torch.float32
        loss(embeddings, labels)
        assert weight.dtype == expected
        assert loss.get_logits(embeddings).dtype == torch.float16
    with pytest.raises(TypeError, match="cast_weights must be a bool"):
        EVERY[name](cast_weights=1)
