"""Users' policies across ranks: pairs of all batches, and classes in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.own_policies import Contrastive, Cosine, Threshold, Unified
from support.ranks import identities, normal, own_rows, run_ranks
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor
from torch import distributed as dist

import unitsface_kernels as uk
from unitsface_kernels import PairLoss, PartialFC
from unitsface_kernels.partial_fc import load_checkpoint, save_checkpoint

D, C = 11, 23
COUNTS = [9, 14]
PAIRS = {
    "contrastive": (Contrastive(), {}),
    "threshold": (Threshold(scale=8.0), {"init_threshold": 2.0}),
    "per identity": (
        Threshold(scale=8.0),
        {"init_threshold": 2.0, "thresholds": "per_identity", "num_identities": 5},
    ),
}


def _pairs(rank: int, backend: str) -> None:
    feats, labels = normal(sum(COUNTS), D, seed=1), identities(sum(COUNTS), seed=2)
    own = own_rows(COUNTS, rank)
    for name, (policy, options) in PAIRS.items():
        alone = PairLoss(policy, backend=backend, **options)
        whole = feats.clone().requires_grad_()
        want = alone(whole, labels)
        wanted = torch.autograd.grad(want, [whole, *alone.parameters()])
        for exchange in ("gather", "ring"):
            across = {"group": dist.group.WORLD, "exchange": exchange}
            loss = PairLoss(policy, backend=backend, **options, **across)
            part = feats[own].clone().requires_grad_()
            got = loss(part, labels[own])
            found = torch.autograd.grad(got, [part, *loss.parameters()])
            check_same(f"{name} {exchange}: loss", got, want, SAME_LOSS)
            # As averaging by data parallelism needs it.
            check_same(f"{name}: feats", found[0], 2 * wanted[0][own], SAME_GRADIENT)
            for a, b in zip(found[1:], wanted[1:], strict=True):
                check_same(f"{name}: threshold", a, b, SAME_GRADIENT)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_pairs_are_those_of_all_ranks(backend: str) -> None:
    run_ranks(2, _pairs, backend)


def _other_formula(rank: int) -> str:
    policy = Contrastive(margin=0.3 + rank)
    feats, labels = normal(6, D, seed=1), identities(6, seed=2)
    with pytest.raises(ValueError, match="margin") as error:
        PairLoss(policy, backend="native", group=dist.group.WORLD)(feats, labels)
    return str(error.value)


def test_ranks_with_different_numbers_are_an_error() -> None:
    assert all("0.3 on rank 0, 1.3 on rank 1" in text for text in run_ranks(2, _other_formula))


# -- classes in shards ----------------------------------------------------------------------------

HEADS: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = [
    (Cosine(scale=16.0), "cosface", {}, {"scale": 16.0}),
    (
        Unified(scale=16.0),
        "class_bce",
        {"thresholds": "per_class", "init_threshold": 4.0, "init_std": 0.3},
        {"scale": 16.0, "init_std": 0.3},
    ),
    (
        Unified(scale=16.0),
        "uce",
        {"init_threshold": 4.0, "init_std": 0.3},
        {"scale": 16.0, "init_std": 0.3},
    ),
]


def _trained(
    rank: int, head: PartialFC, counts: list[int], fuse: bool, steps: int = 4
) -> list[Tensor]:
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "threshold" in name:
                parameter.fill_(4.0)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
    if fuse:
        head.fuse(optimizer)
    found = []
    for step in range(steps):
        feats = normal(sum(counts), D, seed=step)[own_rows(counts, rank)].requires_grad_()
        labels = torch.randint(
            -1, C, (sum(counts),), generator=torch.Generator().manual_seed(50 + step)
        )
        optimizer.zero_grad()
        loss = head(feats, labels[own_rows(counts, rank)])
        loss.backward()
        optimizer.step()
        found += [loss.detach(), feats.grad]
    return [*found, *(p.detach() for p in head.parameters())]


def _heads(rank: int, counts: list[int]) -> None:
    for policy, name, options, theirs in HEADS:
        for more in ({}, {"sample_rate": 0.5}):
            ours = PartialFC(policy, D, C, **more, seed=3, **options)
            other = PartialFC(name, D, C, **more, seed=3, **theirs)
            assert ours.per_class == other.per_class
            fuse = bool(more)
            got, want = (_trained(rank, head, counts, fuse) for head in (ours, other))
            for place, (a, b) in enumerate(zip(got, want, strict=True)):
                check_same(f"{name} {more} {place}", a, b, 4 * SAME_GRADIENT)


@pytest.mark.parametrize("counts", [[12], [5, 7]], ids=str)
def test_sharded_policies_train_as_the_losses_of_their_formulas(counts: list[int]) -> None:
    run_ranks(len(counts), _heads, counts)


def test_a_head_of_a_policy() -> None:
    head = PartialFC(Cosine(scale=8.0), D, C)
    assert head.name == "Cosine"
    assert isinstance(head.loss, uk.ClassLoss)
    assert "Cosine(scale=8.0, margin=0.4)" in repr(head)
    with pytest.raises(TypeError, match="got margin"):
        PartialFC(Cosine(), D, C, margin=0.3)
    with pytest.raises(ValueError, match="loss must be one of"):
        PartialFC(Contrastive(), D, C)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'reference', which has no shards"):
        PartialFC(Cosine(), D, C, backend="reference")
    with pytest.raises(ValueError, match="scale must be > 0"):
        PartialFC(Cosine(scale=0.0), D, C)


def test_checkpoints_name_the_policy(tmp_path: Path) -> None:
    head = PartialFC(Cosine(), D, C, seed=1)
    save_checkpoint(tmp_path / "saved", head)
    other = PartialFC(Cosine(margin=0.2), D, C, seed=1)
    with torch.no_grad():
        other.weight.zero_()
    load_checkpoint(tmp_path / "saved", other)
    assert torch.equal(other.weight, head.weight)
    with pytest.raises(ValueError, match="has loss = Cosine, this PartialFC has Unified"):
        load_checkpoint(tmp_path / "saved", PartialFC(Unified(), D, C, seed=1))
