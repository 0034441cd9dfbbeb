"""Margins per row with classes in shards: two ranks are one process, with its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.partial_fc import COUNTS, SIZE, Run, batch, compare, joined, own_part, sharded
from support.ranks import identities, normal, own_rows, run_ranks
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels.distributed.collectives import world_size
from unitsface_kernels.losses.row_margins import RowMargins
from unitsface_kernels.partial_fc import load_checkpoint, save_checkpoint

MARGINS = torch.linspace(0.2, 0.6, 23)
RUNS = {
    "adaface": Run("adaface", {"scale": 16.0, "t_alpha": 0.3}, steps=4),
    "adaface sampled": Run("adaface", {"scale": 16.0}, sample_rate=0.5, steps=4, fuse="step"),
    "magface": Run("magface", {"scale": 16.0, "l_a": 0.5, "u_a": 1.2, "lambda_g": 3.0}, steps=4),
    "elasticface": Run("elasticface", {"scale": 16.0, "margin_seed": 5}, steps=4),
    "elasticface sorted": Run(
        "elasticface",
        {"scale": 16.0, "assignment": "sorted", "kind": "cos"},
        steps=4,
        fuse="backward",
    ),
    "elasticface published": Run("elasticface", {"assignment": "published"}, steps=4),
    "class_margin": Run("class_margin", {"scale": 16.0, "margin": MARGINS}, steps=4),
    "class_margin learned": Run(
        "class_margin", {"scale": 16.0, "margin": MARGINS, "learned": True}, steps=4
    ),
}


FIRST = ("adaface", "magface", "elasticface sorted", "class_margin learned")
OTHERS = tuple(RUNS.keys() - set(FIRST))


def _trained(rank: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: sharded(rank, RUNS[name]) for name in names}


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, FIRST),
        pytest.param(2, OTHERS, marks=pytest.mark.extended),
        pytest.param(3, (*FIRST, *OTHERS), marks=pytest.mark.extended),
    ],
)
def test_ranks_are_one_process(ranks: int, names: tuple[str, ...]) -> None:
    found = run_ranks(ranks, _trained, names)
    for name in names:
        run = RUNS[name]
        together = joined([of_rank[name] for of_rank in found], run.classes)
        # Ranks draw classes of their own; what all ranks share is the same on all.
        if run.sample_rate == 1.0:
            compare(together, sharded(0, run), name)


def test_one_rank_is_the_module_alone() -> None:
    """The same steps by the module that holds all classes."""
    for name in ("adaface", "magface", "elasticface sorted", "class_margin learned"):
        run = RUNS[name]
        head = uk.PartialFC(run.loss, SIZE, run.classes, seed=3, **run.options)
        module = uk.CLASS_LOSSES[run.loss](SIZE, run.classes, **run.options)
        module.load_state_dict(head.loss.state_dict())
        for step in range(3):
            feats, labels = batch(step, run.classes)
            leaves = [feats.clone().requires_grad_() for _ in range(2)]
            losses = [loss(x, labels) for loss, x in zip((head, module), leaves, strict=True)]
            check_same(f"{name}: loss", losses[0], losses[1], SAME_LOSS)
            for loss in losses:
                loss.backward()
            check_same(f"{name}: feats", leaves[0].grad, leaves[1].grad, SAME_GRADIENT)
        for (key, a), b in zip(
            head.loss.state_dict().items(), module.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), f"{name}: {key}"


def _statistics(rank: int) -> list[float]:
    """Without shards, as data-parallel training has them."""
    counts = [5, 8]
    module = uk.AdaFaceLoss(SIZE, 5, t_alpha=0.3)
    for step in range(3):
        feats, labels = normal(sum(counts), SIZE, seed=step), identities(sum(counts), seed=step)
        own = own_rows(counts, rank)
        module(feats[own] * (1 + step), labels[own])
    return [float(module.batch_mean), float(module.batch_std)]


def test_statistics_are_those_of_all_ranks() -> None:
    alone = uk.AdaFaceLoss(SIZE, 5, t_alpha=0.3)
    for step in range(3):
        alone(normal(13, SIZE, seed=step) * (1 + step), identities(13, seed=step))
    for found in run_ranks(2, _statistics):
        assert found == pytest.approx([float(alone.batch_mean), float(alone.batch_std)], rel=1e-6)


def _failing(rank: int) -> tuple[float, float]:
    head = uk.PartialFC("adaface", SIZE, 23, seed=3)
    feats, labels = (own_part(t, rank, COUNTS[2]) for t in batch(0, 23))
    wrong = labels + 23 if rank else labels
    with pytest.raises(ValueError, match="labels"):
        head(feats, wrong)
    before = head.loss.batch_mean.item()
    with torch.no_grad():
        head(feats, labels)
    head.eval()(feats, labels)
    unmoved = head.loss.batch_mean.item()
    head.train()(feats, labels)
    assert head.loss.batch_mean.item() != unmoved
    return before, unmoved


def test_a_step_that_fails_moves_no_statistics() -> None:
    assert run_ranks(2, _failing) == [(20.0, 20.0)] * 2


def test_checkpoints_have_statistics_and_margins(tmp_path) -> None:
    for loss, options in (("adaface", {}), ("elasticface", {}), ("class_margin", {})):
        head = uk.PartialFC(loss, SIZE, 23, seed=3, **options)
        feats, labels = batch(0, 23)
        head(feats, labels)
        if loss == "class_margin":
            head.loss.margin.uniform_()
        save_checkpoint(tmp_path / loss, head)
        other = uk.PartialFC(loss, SIZE, 23, seed=3, **options)
        load_checkpoint(tmp_path / loss, other)
        for (key, a), b in zip(
            head.loss.state_dict().items(), other.loss.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), f"{loss}: {key}"


def _margins(rank: int) -> list[Tensor]:
    """Margins of the rows as an argument of a policy's head."""
    head = uk.PartialFC(RowMargins(scale=16.0), SIZE, 23, seed=3)
    counts = COUNTS[world_size()]
    feats, labels = batch(0, 23)
    feats = own_part(feats, rank, counts).requires_grad_()
    m2 = own_part(torch.linspace(0.0, 0.5, 12), rank, counts).requires_grad_()
    ones = torch.ones(len(feats))
    loss = head(feats, own_part(labels, rank, counts), m1=ones, m2=m2, m3=0.1 * ones)
    loss.backward()
    return [loss.detach(), feats.grad / len(counts), m2.grad / len(counts)]


def test_margins_per_row_across_ranks() -> None:
    alone, found = _margins(0), run_ranks(2, _margins)
    check_same("loss", found[0][0], alone[0], SAME_LOSS)
    for place in (1, 2):
        got = torch.cat([of_rank[place] for of_rank in found])
        check_same(f"gradient {place}", got, alone[place], SAME_GRADIENT)
