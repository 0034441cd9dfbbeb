"""PartialFC of losses with proxies: classes that have the losses, and norms of classes."""

from __future__ import annotations

import pytest
import torch
from support.partial_fc import COUNTS, SIZE, Run, batch, compare, joined, own_part, sharded, single
from support.ranks import run_ranks

import unitsface_kernels as uk
from unitsface_kernels.distributed.collectives import world_size
from unitsface_kernels.distributed.partial_fc.sampling import sample_classes

CLASSES = 23
# Inner products of features and weights of norms near 1.
SIMPLE = {"init_bias": -0.5, "loss_weight": 2.0, "alpha": 0.4, "margin": 0.1}
RUNS = [
    Run("proxy_anchor", {}, 1.0, steps=4),
    Run("proxy_anchor", {"alpha": 8.0, "reduction": "sum"}, 0.4, steps=4),
    Run("proxy_anchor", {}, 0.4, "adamw", steps=4, max_norm=0.2),
    # Fewer classes than ranks.
    Run("proxy_anchor", {}, 1.0, classes=2, steps=2),
    Run("simple_proxy", SIMPLE, 1.0, steps=4),
    Run("simple_proxy", SIMPLE, 0.4, "adamw", "backward", steps=4),
    Run("simple_proxy", SIMPLE, 0.4, fuse="step", steps=4),
]


def _all_runs(rank: int) -> list[dict]:
    return [sharded(rank, run) for run in RUNS]


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(1, marks=pytest.mark.extended), 2, pytest.param(3, marks=pytest.mark.extended)],
)
def test_training_is_that_of_one_process(ranks: int) -> None:
    found = run_ranks(ranks, _all_runs)
    for number, run in enumerate(RUNS):
        of_ranks = joined([each[number] for each in found], run.classes)
        compare(of_ranks, single(run, ranks), run.name())


def test_sampled_proxies_are_those_that_take_part() -> None:
    """The gradient of the others is none, and the loss that of the drawn ones alone."""
    head = uk.PartialFC("proxy_anchor", SIZE, CLASSES, 0.5, seed=3)
    feats, labels = batch(0, CLASSES)
    index, positions = sample_classes(labels, CLASSES, 11, seed=3, rank=0, step=0)
    loss = head(feats, labels)
    weight = head.weight.detach().clone().requires_grad_()
    wanted = uk.fused_proxy_anchor_loss(feats, weight, positions, class_index=index)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    gradient = head.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.is_coalesced()
    assert torch.equal(gradient.indices()[0], index)
    torch.testing.assert_close(gradient.to_dense(), weight.grad)


def _ignored(rank: int) -> list[torch.Tensor]:
    """An ignored sample that is not finite, on the last rank."""
    head = uk.PartialFC("proxy_anchor", SIZE, CLASSES, seed=3)
    feats, labels = batch(0, CLASSES)
    labels[-1], feats[-1] = -1, torch.nan
    feats, labels = (own_part(t, rank, COUNTS[world_size()]) for t in (feats, labels))
    feats.requires_grad_()
    loss = head(feats, labels)
    loss.backward()
    assert feats.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), feats.grad, head.weight.grad]


def test_ignored_samples_take_no_part() -> None:
    (one,), two = run_ranks(1, _ignored), run_ranks(2, _ignored)
    assert bool(one[0].isfinite())
    assert not bool(one[1][-1].any())
    for rank in two:
        torch.testing.assert_close(rank[0], one[0])
    # For the mean over ranks, which data parallelism takes.
    torch.testing.assert_close(torch.cat([rank[1] for rank in two]) / 2.0, one[1])
    torch.testing.assert_close(torch.cat([rank[2] for rank in two]), one[2])


def test_what_it_refuses() -> None:
    feats, labels = batch(0, CLASSES)
    head = uk.PartialFC("proxy_anchor", SIZE, CLASSES, reduction="none")
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum" for proxy_anchor,'):
        head(feats, labels)
    with pytest.raises(ValueError, match="complete after all samples"):
        head.fuse(uk.SampledSGD(head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="loss must be"):
        uk.PartialFC("simple", SIZE, CLASSES)
