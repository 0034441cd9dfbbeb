"""Learned numbers of losses across ranks, against one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.ranks import identities, normal, own_rows, run_ranks
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import distributed as dist
from torch import nn

import unitsface_kernels as uk
from unitsface_kernels import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)
#: Losses with learned numbers, and what each takes.
SHARDED = {
    "cosface": {"scale": 12.0, "margin": 0.3},
    "npt": {"margin": 0.7},
    "epl": {"scale": 12.0, "start_epoch": 0},
    "proxy_anchor": {"margin": 0.2},
}
LEARNED = ("scale", "margin")


def _options(given: dict[str, float]) -> dict[str, object]:
    return {
        name: nn.Parameter(torch.tensor(value)) if name in LEARNED and name != "start_epoch" else 0
        for name, value in given.items()
    }


def _sharded(rank: int, counts: Sequence[int], name: str) -> None:
    """The upstream gradient is the same on every rank."""
    own, total, size = own_rows(counts, rank), sum(counts), len(counts)
    feats = normal(total, 11, seed=1)
    labels = torch.randint(-1, 17, (total,), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    whole = uk.CLASS_LOSSES[name](11, 17, backend="native", **_options(SHARDED[name]))
    shard = uk.PartialFC(name, 11, 17, backend="native", **_options(SHARDED[name]))
    learned = {n: p for n, p in whole.named_parameters() if p.dim() == 0}
    assert len(learned) == len(SHARDED[name].keys() - {"start_epoch"})
    kept = dict(shard.loss.named_parameters())
    for each, parameter in learned.items():
        assert f"loss.{each}" not in shard.per_class
        assert torch.equal(kept[each], parameter)
    mine = slice(shard.shard.start, shard.shard.stop)
    tensors = dict(shard.loss.named_parameters()) | dict(shard.loss.named_buffers())
    with torch.no_grad():
        for each, tensor in (*whole.named_parameters(), *whole.named_buffers()):
            if f"loss.{each}" in shard.per_class:
                tensors[each].copy_(tensor[mine])
    results = []
    for module, some in ((whole, slice(None)), (shard, own)):
        leaf = feats[some].clone().requires_grad_()
        loss = module(leaf, labels[some])
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (want, want_rows), (got, rows) = results
    check_same(f"{name}: loss", got, want, SAME_LOSS)
    check_same(f"{name}: feats", rows, want_rows[own] * size, SAME_GRADIENT)
    for each, parameter in learned.items():
        check_same(f"{name}: {each}", kept[each].grad, parameter.grad, SAME_GRADIENT)
    own_gradients, shared = shard.gradients()
    assert len(shared) == len(learned)
    assert all(gradient.dim() for gradient in own_gradients)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name", ["cosface", *(pytest.param(n, marks=pytest.mark.extended) for n in [*SHARDED][1:])]
)
def test_sharded_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    run_ranks(2, _sharded, (7, 4), name)


def _pairs(rank: int, counts: Sequence[int], name: str) -> None:
    own, total = own_rows(counts, rank), sum(counts)
    samples, labels = normal(total, 11, seed=1), identities(total, seed=2)
    results = []
    for group, some, upstream in ((None, slice(None), len(counts)), (dist.group.WORLD, own, 1)):
        scale = nn.Parameter(torch.tensor(7.0))
        options = {"init_threshold": 1.0} if name == "uss" else {}
        loss = uk.PAIR_LOSSES[name](scale=scale, backend="native", group=group, **options)
        leaf = samples[some].clone().requires_grad_()
        value = loss(leaf, labels[some])
        (value * upstream).backward()
        results.append((value.detach(), leaf.grad, scale.grad))
    (want, want_rows, want_scale), (got, rows, scale_grad) = results
    check_same(f"{name}: loss", got, want, SAME_LOSS)
    check_same(f"{name}: feats", rows, want_rows[own], SAME_GRADIENT)
    check_same(f"{name}: scale", scale_grad, want_scale / len(counts), SAME_GRADIENT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    ["uss", *(pytest.param(n, marks=pytest.mark.extended) for n in ("pair_softmax", "circle"))],
)
def test_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    run_ranks(2, _pairs, (9, 4), name)


def _mistakes(rank: int) -> list[str]:
    """On one rank alone; the others do not wait for it."""
    feats, labels = normal(6, 4, seed=1), identities(6, seed=2)
    found = []
    for scale in (
        torch.tensor(-1.0 if rank else 1.0),
        nn.Parameter(torch.tensor(2.0)) if rank else 2.0,
        nn.Parameter(torch.tensor(2.0 + rank)),
    ):
        with pytest.raises(ValueError, match="must be") as error:
            uk.fused_uss_loss(feats, labels, 0.0, scale=scale, group=dist.group.WORLD)
        found.append(str(error.value))
    head = uk.PartialFC("cosface", 4, 17, scale=nn.Parameter(torch.tensor(2.0)))
    with torch.no_grad():
        head.loss.scale.fill_(-1.0 if rank else 2.0)
    with pytest.raises(ValueError, match="must be") as error:
        head(feats, labels)
    found.append(str(error.value))
    return found


def test_mistakes_of_one_rank() -> None:
    first, second = run_ranks(2, _mistakes)
    assert first[0] == "rank 1: scale must be > 0, got -1.0"
    assert second[0] == "scale must be > 0, got -1.0"
    assert "the loss must be the same" in first[1]
    assert "uss on rank 0, uss+scale on rank 1" in first[1]
    assert "checksum of scale must be the same" in first[2]
    assert first[3] == "rank 1: scale must be > 0, got -1.0"
