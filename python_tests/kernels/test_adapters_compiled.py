"""Formulas of the adapters as compiled kernels, on every backend against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.compiled import needs_compiler
from support.helpers import FUSED, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import nn

from unitsface_kernels.adapters import metric_learning as ours
from unitsface_kernels.adapters.metric_learning.measures import EUCLIDEAN, Measure

_INNER, _RAW = Measure(normalize=False), Measure(similarity=False, normalize=False)

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "ntxent": lambda **k: ours.NTXentLoss(0.5, distance=EUCLIDEAN, **k),
    "ntxent-raw": lambda **k: ours.NTXentLoss(0.5, distance=_INNER, **k),
    "supcon": lambda **k: ours.SupConLoss(0.5, distance=EUCLIDEAN, **k),
    "contrastive": lambda **k: ours.ContrastiveLoss(0.2, 1.2, **k),
    "contrastive-raw": lambda **k: ours.ContrastiveLoss(0.2, 3.0, distance=_RAW, **k),
    "multi_similarity": lambda **k: ours.MultiSimilarityLoss(2, 8, distance=EUCLIDEAN, **k),
    "proxy_anchor": lambda **k: ours.ProxyAnchorLoss(5, 16, alpha=8, distance=EUCLIDEAN, **k),
    "sphereface": lambda **k: ours.SphereFaceLoss(5, 16, **k),
    "large_margin": lambda **k: ours.LargeMarginSoftmaxLoss(5, 16, margin=2, **k),
    "normalized_softmax": lambda **k: ours.NormalizedSoftmaxLoss(5, 16, distance=_INNER, **k),
}


@needs_compiler
@pytest.mark.extended
@pytest.mark.parametrize("target", FUSED, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_formulas(name: str, target: Target) -> None:
    torch.manual_seed(1)
    mine = LOSSES[name](backend=target.backend).to(target.device)
    exact = LOSSES[name](backend="reference").double()
    exact.load_state_dict(mine.state_dict())
    embeddings, labels = torch.randn(40, 16) * 0.5, torch.arange(40) % 5
    leaf = embeddings.to(target.device).requires_grad_()
    wide = embeddings.double().requires_grad_()
    loss, want = mine(leaf, labels.to(target.device)), exact(wide, labels)
    check_same("loss", loss.detach().cpu(), want.detach(), SAME_LOSS)
    sides = [[leaf, *mine.parameters()], [wide, *exact.parameters()]]
    found = [torch.autograd.grad(*each) for each in zip((loss, want), sides, strict=True)]
    for got, expected in zip(*found, strict=True):
        check_same("gradient", got.cpu(), expected, SAME_GRADIENT)
