"""Margins per row and per class, against the published formulas, written anew in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import TARGETS, Target
from support.row_margins import C, D, N, batch, compare, cosines, cross_entropy, of_targets, widened
from support.tolerances import EXACT, SAME_GRADIENT, check_same
from torch import Tensor

import unitsface_kernels as uk

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def adaface(
    feats: Tensor, weight: Tensor, labels: Tensor, mean: float, std: float, m=0.4, h=0.333
) -> Tensor:
    """head.py of mk-minchul/AdaFace, class AdaFace."""
    cosine = cosines(feats, weight).clamp(-1 + 1e-3, 1 - 1e-3)
    safe = feats.norm(dim=1).clip(0.001, 100).detach()
    scaler = ((safe - mean) / (std + 1e-3) * h).clip(-1, 1)
    theta = (of_targets(cosine, labels).acos() - m * scaler).clip(1e-3, math.pi - 1e-3)
    return cross_entropy(cosine, theta.cos() - (m + m * scaler), labels, 64.0)


def magface(
    feats: Tensor, weight: Tensor, labels: Tensor, easy: bool, l_a=10.0, u_a=60.0, lambda_g=35.0
) -> Tensor:
    """models/magface.py and run/trainer.py of IrvingMeng/MagFace."""
    norm = feats.norm(dim=1).clamp(l_a, u_a)
    margin = (0.8 - 0.45) / (u_a - l_a) * (norm - l_a) + 0.45
    cosine = cosines(feats, weight)
    own = of_targets(cosine, labels)
    moved = own * margin.cos() - (1.0 - own.square()).sqrt() * margin.sin()
    if easy:
        moved = torch.where(own > 0, moved, own)
    else:
        beyond = own - torch.sin(math.pi - margin) * margin
        moved = torch.where(own > torch.cos(math.pi - margin), moved, beyond)
    regularizer = (norm / u_a**2 + 1.0 / norm)[labels != -1].mean()
    return cross_entropy(cosine, moved, labels, 64.0) + lambda_g * regularizer


def elasticface(feats: Tensor, weight: Tensor, labels: Tensor, margin: Tensor, kind: str) -> Tensor:
    """utils/losses.py of fdbtrs/ElasticFace, of margins that are already drawn."""
    cosine = cosines(feats, weight)
    own = of_targets(cosine, labels)
    moved = (own.acos() + margin).cos() if kind == "arc" else own - margin
    return cross_entropy(cosine, moved, labels, 64.0)


def ldam(feats: Tensor, weight: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """losses.py of kaidic/LDAM-DRW, on cosines, as its models with use_norm give them."""
    margins = 1.0 / counts.double().sqrt().sqrt()
    margins = margins * (0.5 / margins.max())
    cosine = cosines(feats, weight)
    return cross_entropy(
        cosine, of_targets(cosine, labels) - margins[labels.clamp_min(0)], labels, 30.0
    )


@each_target
@pytest.mark.parametrize(("mean", "std"), [(40.0, 20.0), (5.0, 0.5), (95.0, 30.0)])
def test_adaface_is_the_published_one(target: Target, mean: float, std: float) -> None:
    feats, weight, labels = batch(target.device)
    got = uk.fused_adaface_loss(feats, weight, labels, mean, std, backend=target.backend)
    wide = widened(feats, weight)
    compare(got, adaface(*wide, labels, mean, std), (feats, weight), wide)


def test_adaface_clips_angles_as_published() -> None:
    """Targets at their class and opposite to it, where the published code has no gradient."""
    weight = torch.eye(4, dtype=torch.float64)
    feats = torch.stack([30 * weight[0], -30 * weight[1], 0.3 * weight[2], -weight[3]])
    feats = (feats + 1e-9).requires_grad_()
    labels = torch.arange(4)
    got = uk.fused_adaface_loss(feats, weight, labels, 10.0, 1.0, reduction="none")
    want = []
    for row in range(4):
        cosine = cosines(feats[row : row + 1], weight).clamp(-0.999, 0.999)
        norm = feats[row].norm().detach().clip(0.001, 100)
        scaler = ((norm - 10.0) / 1.001 * 0.333).clip(-1, 1)
        theta = (cosine[0, row].acos() - 0.4 * scaler).clip(1e-3, math.pi - 1e-3)
        logits = cosine.clone()
        logits[0, row] = theta.cos() - (0.4 + 0.4 * scaler)
        want.append(F.cross_entropy(64 * logits, labels[row : row + 1]))
    check_same("loss", got, torch.stack(want), EXACT)
    (gradient,) = torch.autograd.grad(got.sum(), feats)
    (wanted,) = torch.autograd.grad(sum(want), feats)
    check_same("gradient", gradient, wanted, EXACT)


@each_target
@pytest.mark.parametrize("margin_type", ["easy", "hard"])
def test_magface_is_the_published_one(target: Target, margin_type: str) -> None:
    feats, weight, labels = batch(target.device, spread=3.0)
    options: dict[str, Any] = {"u_a": 60.0, "margin_type": margin_type, "backend": target.backend}
    got = uk.fused_magface_loss(feats, weight, labels, **options)
    wide = widened(feats, weight)
    compare(got, magface(*wide, labels, margin_type == "easy"), (feats, weight), wide)
    # A gradient along the feature: that of the norm.
    (gradient,) = torch.autograd.grad(
        uk.fused_magface_loss(feats, weight, labels, **options), feats
    )
    radial = (gradient * F.normalize(feats)).sum(dim=1).abs()
    inside = (feats.norm(dim=1) > 10) & (feats.norm(dim=1) < 60) & (labels >= 0)
    assert bool((radial[inside] > 1e-6).all())
    assert bool((radial[~inside] < 1e-6).all())


@each_target
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_regularizer_follows_the_reduction(target: Target, reduction: str) -> None:
    feats, weight, labels = batch(target.device)
    with_it, without = (
        uk.fused_magface_loss(
            feats, weight, labels, lambda_g=g, reduction=reduction, backend=target.backend
        )
        for g in (35.0, 0.0)
    )
    norm = feats.detach().norm(dim=1).clamp(10.0, 110.0)
    terms = torch.where(labels >= 0, 35.0 * (norm / 110.0**2 + 1.0 / norm), 0.0)
    want = {"none": terms, "sum": terms.sum(), "mean": terms.sum() / (labels >= 0).sum()}
    difference = (with_it - without).detach()
    assert float((difference - want[reduction]).abs().max()) < 1e-4


@each_target
@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface_is_the_published_one(target: Target, kind: str) -> None:
    feats, weight, labels = batch(target.device)
    margin = torch.linspace(0.3, 0.7, N, device=target.device, requires_grad=True)
    got = uk.fused_elasticface_loss(
        feats, weight, labels, margin, kind=kind, backend=target.backend
    )
    wide = widened(feats, weight, margin)
    want = elasticface(*wide[:2], labels, wide[2], kind)
    compare(got, want, (feats, weight, margin), wide)
    want = elasticface(*wide[:2], labels, wide[2], kind)
    per_row = {"m2": margin, "m3": 0.0} if kind == "arc" else {"m3": margin}
    other = uk.fused_margin_softmax_loss(feats, weight, labels, **per_row, backend=target.backend)
    compare(other, want, (feats, weight, margin), wide)


@each_target
def test_margins_of_classes_are_those_of_ldam(target: Target) -> None:
    feats, weight, labels = batch(target.device)
    counts = torch.tensor([500, 3, 40, 41, 7, 1000, 20, 90, 5])
    module = uk.ClassMarginLoss(
        D, C, scale=30.0, margin=0.5, counts=counts, learned=True, backend=target.backend
    ).to(target.device)
    module.weight.data.copy_(weight.data)
    wide = widened(feats, weight)
    want = ldam(*wide, labels, counts.to(target.device))
    compare(module(feats, labels), want, (feats, module.weight), wide)
    (gradient,) = torch.autograd.grad(module(feats, labels), module.margin)  # type: ignore
    moved = module.margin.detach().double().requires_grad_()
    cosine = cosines(*(leaf.detach() for leaf in wide))
    target_cosine = of_targets(cosine, labels) - moved[labels.clamp_min(0)]
    (wanted,) = torch.autograd.grad(cross_entropy(cosine, target_cosine, labels, 30.0), moved)
    check_same("margins", gradient, wanted, SAME_GRADIENT)


def test_margins_by_frequency() -> None:
    counts = torch.tensor([1, 16, 81, 0])
    torch.testing.assert_close(
        uk.frequency_margins(counts), torch.tensor([0.5, 0.25, 0.5 / 3, 0.5])
    )
    # train.py of the third place of Google Landmark Recognition 2020.
    inverse = torch.tensor([1.0, 1 / 2, 1 / 3, 1.0])
    want = (inverse - 1 / 3) / (2 / 3) * 0.45 + 0.05
    torch.testing.assert_close(uk.frequency_margins(counts, 0.5, 0.05), want)
    equal = uk.frequency_margins(torch.full((3,), 7), 0.4, 0.1)
    torch.testing.assert_close(equal, torch.full((3,), 0.4))
