"""Variables of formulas as parameters of modules, in shards and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import normal, own_rows, run_ranks
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk
from train.config.sections import LossConfig
from train.examples.policies import ClassMargin
from train.losses import build_loss
from unitsface_kernels import ClassLoss, PairLoss, PartialFC, policy

N, D, C = 17, 8, 6
BACKENDS = ("reference", "native")


class Weighted(policy.Pair):
    """One variable of every kind."""

    scale: policy.Scalar = 2.0
    shift: policy.PerIdentity
    weight_of_row: policy.PerRow

    def positive(self, c):
        return self.weight_of_row * policy.square(self.shift - c)

    def negative(self, c):
        return self.weight_of_row * policy.softplus(self.scale * c - self.shift)


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % C


def by_hand(loss: PairLoss, feats: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    unit = F.normalize(feats, dim=1)
    cosine, shift = unit @ unit.T, loss.shift[labels][None]
    other = ~torch.eye(len(labels), dtype=torch.bool)
    same = labels[:, None] == labels[None]
    terms = torch.where(same, (shift - cosine) ** 2, F.softplus(loss.scale * cosine - shift))
    return (weights[:, None] * terms * other).sum(dim=1).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_there_is_one_of_is_a_parameter(backend: str) -> None:
    loss = PairLoss(Weighted(), num_identities=C, shift=0.7, backend=backend)
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {
        "scale": (),
        "shift": (C,),
    }
    assert loss.scale.item() == 2.0
    assert loss.shift.tolist() == pytest.approx([0.7] * C)
    feats, labels = normal(N, D, seed=1).requires_grad_(), labels_of(N)
    weights = (1.0 + normal(N, seed=2).abs()).requires_grad_()
    leaves = [feats, weights, *loss.parameters()]
    got = loss(feats, labels, weight_of_row=weights)
    want = by_hand(loss, feats, labels, weights)
    check_same("loss", got, want, SAME_LOSS)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for place, (a, b) in enumerate(pairs):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)
    loss.scale.requires_grad_(False)
    assert len(torch.autograd.grad(loss(feats, labels, weight_of_row=weights), [feats])) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_margin_per_class(backend: str) -> None:
    margins = torch.linspace(0.0, 0.5, C)
    loss = ClassLoss(ClassMargin(scale=8.0), D, C, margin=margins, backend=backend)
    assert torch.equal(loss.margin.detach(), margins)
    feats, labels = normal(N, D, seed=1).requires_grad_(), labels_of(N)
    cosine = F.normalize(feats, dim=1) @ F.normalize(loss.weight, dim=1).T
    target = F.one_hot(labels, C) * loss.margin[labels][:, None]
    want = F.cross_entropy(8.0 * (cosine - target), labels)
    got = loss(feats, labels)
    check_same("loss", got, want, SAME_LOSS)
    leaves = [feats, *loss.parameters()]
    assert [n for n, _ in loss.named_parameters()] == ["weight", "margin"]
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for place, (a, b) in enumerate(pairs):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)
    with torch.no_grad():
        loss.margin.zero_()
    loss.reset_parameters()
    assert torch.equal(loss.margin.detach(), margins)
    other = copy.deepcopy(loss)
    assert torch.equal(other.margin, loss.margin)
    assert other.margin is not loss.margin


def _sharded(rank: int, counts: list[int]) -> None:
    margins = torch.linspace(0.0, 0.5, C)
    head = PartialFC(ClassMargin(scale=8.0), D, C, seed=1, margin=margins)
    assert head.per_class == {"loss.weight", "loss.margin"}
    shard = slice(head.shard.start, head.shard.stop)
    assert torch.equal(head.loss.margin.detach(), margins[shard])
    weight = torch.cat([rows for _, rows in _all_rows(head)])
    feats, labels = normal(sum(counts), D, seed=1).requires_grad_(), labels_of(sum(counts))
    module = ClassLoss(ClassMargin(scale=8.0), D, C, margin=margins, backend="reference")
    with torch.no_grad():
        module.weight.copy_(weight)
    want = module(feats, labels)
    wanted = torch.autograd.grad(want, [feats, *module.parameters()])
    part = feats.detach()[own_rows(counts, rank)].requires_grad_()
    got = head(part, labels[own_rows(counts, rank)])
    found = torch.autograd.grad(got, [part, head.loss.weight, head.loss.margin])
    check_same("loss", got, want, SAME_LOSS)
    share = len(counts) * wanted[0][own_rows(counts, rank)]
    check_same("feats", found[0], share, SAME_GRADIENT)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        check_same("of classes", a, b[shard], SAME_GRADIENT)


def _all_rows(head: PartialFC) -> list[tuple[Any, Tensor]]:
    """Initial class weights of all ranks, which depend on the seed alone."""
    from unitsface_kernels.distributed.partial_fc.shard import Shard

    rows = Shard(C, 0, C).normal_rows(D, ".weight", head.seed)
    return [(place, 0.01 * normal) for place, normal in rows]


@pytest.mark.parametrize("counts", [[12], [5, 7]], ids=str)
def test_margins_per_class_are_sharded(counts: list[int]) -> None:
    run_ranks(len(counts), _sharded, counts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PairLoss(Weighted(), num_identities=C),
            r"shift of Weighted needs an initial value",
        ),
        (lambda: PairLoss(Weighted(), shift=0.5), "num_identities must be given for the variable"),
        (lambda: PairLoss(Weighted(), shift="a", num_identities=3), "shift must be a float"),
        (lambda: PairLoss(Weighted(), weight_of_row=1.0), "got weight_of_row"),
        (lambda: ClassLoss(ClassMargin(), D, C, margins=0.3), r"keeps \(margin\), got margins"),
        (lambda: ClassLoss(ClassMargin(), D, C, margin=torch.zeros(3)), "margin must have shape"),
        (lambda: ClassLoss(Clashing(), D, C), "name of an attribute of its module, got weight"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


class Clashing(policy.Class):
    weight: policy.Scalar = 1.0

    def negative(self, c):
        return self.weight * c


def test_a_variable_of_rows_has_to_be_given() -> None:
    loss = PairLoss(Weighted(), num_identities=C, shift=0.5)
    with pytest.raises(TypeError, match="got no value for weight_of_row"):
        loss(normal(N, D, seed=1), labels_of(N))


def test_options_of_training_start_variables() -> None:
    options = {"margin": 0.25, "scale": 30.0}
    name = "train.examples.policies:ClassMargin"
    loss = build_loss(LossConfig(class_name=name, pair_name="none", class_options=options), C, D)
    assert isinstance(loss.class_loss, uk.ClassLoss)
    assert loss.class_loss.margin.tolist() == [0.25] * C
    assert loss.class_loss.policy.scale == 30.0


def test_check_runs_with_variables() -> None:
    report = policy.check(ClassMargin(), backends=BACKENDS, show=False)
    assert report.ok, str(report)
    report = policy.check(Weighted(), backends=BACKENDS, show=False)
    assert report.ok, str(report)
