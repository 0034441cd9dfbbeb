"""A problem with margins per row, and comparison of values and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

N, C, D = 13, 9, 8


def batch(device: str = "cpu", spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of norms from 3 to 90, class weights and labels, of which one is ignored."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(C, D, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    feats = spread * torch.randn(N, D, generator=generator) + weight[labels]
    feats = F.normalize(feats) * torch.linspace(3.0, 90.0, N)[:, None]
    labels[4] = -1
    leaves = (feats.to(device).requires_grad_(), weight.to(device).requires_grad_())
    return *leaves, labels.to(device)


def cross_entropy(cosine: Tensor, target: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Mean over the rows that take part, with ``target`` in place of their classes' cosines."""
    rows = torch.arange(N, device=labels.device)
    logits = scale * cosine.index_put((rows, labels.clamp_min(0)), target)
    return F.cross_entropy(logits, labels, ignore_index=-1)


def cosines(feats: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(feats) @ F.normalize(weight).T


def of_targets(cosine: Tensor, labels: Tensor) -> Tensor:
    return cosine.gather(1, labels.clamp_min(0)[:, None])[:, 0]


def compare(
    got: Tensor, want: Tensor, leaves: tuple[Tensor, ...], wide: tuple[Tensor, ...]
) -> None:
    """Values and gradients."""
    check_same("loss", got, want, SAME_LOSS)
    for place, (a, b) in enumerate(
        zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide), strict=True)
    ):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)


def widened(*leaves: Tensor) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
