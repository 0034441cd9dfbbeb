"""Formulas that read statistics of an earlier pass: the snippet of docs/custom_losses.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import ROOT, TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

PAGE = (ROOT / "docs" / "custom_losses.md").read_text()
SECTION = PAGE.partition("## Statistics of an earlier pass")[2].partition("\n## ")[0]


def _published(feats: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Multi-Similarity with its mining, written from the published code, row by row.

    ret_benchmark/losses/multi_similarity_loss.py in msight-tech/research-ms-loss, without its
    exclusion of positives at a cosine of 1, which is that of a sample with itself.
    """
    unit = F.normalize(feats.double())
    losses = []
    for i, similarities in enumerate(unit @ unit.T):
        others = torch.arange(len(feats)) != i
        positives = similarities[others & (labels == labels[i])]
        negatives = similarities[labels != labels[i]]
        hard_positives = positives[positives - margin < negatives.max()]
        hard_negatives = negatives[negatives + margin > positives.min()]
        pull = torch.exp(-2.0 * (hard_positives - 0.5)).sum()
        push = torch.exp(50.0 * (hard_negatives - 0.5)).sum()
        losses.append(torch.log1p(pull) / 2.0 + torch.log1p(push) / 50.0)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_mining_by_statistics_of_a_first_pass(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNITSFACE_BACKEND", target.backend)
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(14) % 4
    centers = torch.randn(4, 8, generator=generator)
    start = (centers[labels] + torch.randn(14, 8, generator=generator)).to(target.device)
    feats = start.requires_grad_()
    names: dict[str, Any] = {"feats": feats, "labels": labels.to(target.device)}
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    exec(code, names)
    names["loss"].backward()

    free = start.detach().cpu().double().requires_grad_()
    expected = _published(free, labels, 0.1)
    expected.backward()
    check_same("loss", names["loss"].cpu(), expected, SAME_LOSS)
    check_same("gradient", feats.grad.cpu(), free.grad, SAME_GRADIENT)
    # Without mining the loss is another one: some pairs are left out.
    assert abs(float((expected - _published(free, labels, 10.0)).detach())) > 1e-3
