"""Claims of the documents about published training code, against its rules written anew."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import ROOT, TARGETS, Target
from support.tolerances import SAME_GRADIENT, check_same
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels.distributed.partial_fc.sampling import sample_classes

D, C = 8, 30


def snippets(name: str) -> list[str]:
    text = (ROOT / "docs" / name).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def _problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(C, D, generator=generator)
    labels = torch.randint(0, C, (9,), generator=generator)
    return torch.randn(9, D, generator=generator) + weight[labels], weight, labels


def _combined_margin(cosine: Tensor, labels: Tensor, margins: tuple[float, ...]) -> Tensor:
    """insightface's rule: arcface_torch/losses.py, CombinedMarginLoss."""
    m1, m2, m3 = margins
    rows = torch.arange(len(labels))
    target = cosine[rows, labels]
    if m1 == 1.0 and m3 == 0.0:
        shifted = target + (torch.cos(torch.acos(target) + m2) - target).detach()
    else:
        assert m3 > 0
        shifted = target - m3
    return F.cross_entropy(64.0 * cosine.index_put((rows, labels), shifted), labels)


@pytest.mark.parametrize(
    "margins", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (1.0, 0.3, 0.2), (0.9, 0.4, 0.1)]
)
def test_margin_list_of_insightface(margins: tuple[float, float, float]) -> None:
    feats, weight, labels = _problem()
    cfg = SimpleNamespace(
        margin_list=margins,
        embedding_size=D,
        num_classes=C,
        sample_rate=1.0,
        lr=0.1,
        weight_decay=5e-4,
    )
    names = {
        "cfg": cfg,
        "backbone": torch.nn.Linear(3, D),
        "local_embeddings": feats.requires_grad_(),
        "local_labels": labels,
    }
    made, called = snippets("from_insightface.md")[0].split("module_partial_fc.fuse(opt)")
    exec(made, names)
    head = names["module_partial_fc"]
    head.weight.data.copy_(weight)
    exec("loss =" + called.split("loss =")[1], names)
    wanted = weight.clone().requires_grad_()
    want = _combined_margin(F.normalize(feats) @ F.normalize(wanted).T, labels, margins)
    check_same("loss", names["loss"].detach(), want.detach(), SAME_GRADIENT)
    of_want = torch.autograd.grad(want, [feats, wanted])
    for got, gradient in zip(
        torch.autograd.grad(names["loss"], [feats, head.weight]), of_want, strict=True
    ):
        check_same("gradient", got, gradient, SAME_GRADIENT)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradient_of_opensphere_with_its_radial_part(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit weights without the Jacobian of a normalization; cosines are 1e-5 too small here."""
    monkeypatch.setenv("UNITSFACE_BACKEND", target.backend)
    feats, weight, labels = (t.to(target.device) for t in _problem())
    names = {
        "torch": torch,
        "F": F,
        "fused_margin_softmax_loss": uk.fused_margin_softmax_loss,
        "feats": feats.clone().requires_grad_(),
        "weight": weight.clone().requires_grad_(),
        "labels": labels,
    }
    exec(snippets("math.md")[0], names)
    theirs = [feats.clone().requires_grad_(), F.normalize(weight).requires_grad_()]
    cosine = F.normalize(theirs[0]) @ theirs[1].T
    want = _combined_margin(cosine, labels, (1.0, 0.5, 0.0))
    allowed = 64.0 * 1e-5
    check_same("loss", names["loss"].detach(), want.detach(), allowed)
    got = torch.autograd.grad(names["loss"], [names["feats"], names["weight"]])
    gradients = torch.autograd.grad(want, theirs)
    for mine, gradient in zip(got, gradients, strict=True):
        check_same("gradient", mine, gradient, allowed)
    radial = (gradients[1] * theirs[1]).sum(dim=1)
    assert float(radial.detach().norm()) > 100 * allowed * float(gradients[1].norm())


def test_sgd_of_partial_fc_v2_decays_all_rows() -> None:
    """Dense gradients, zero where a class is not drawn, as of an indexed weight."""
    head = uk.PartialFC("arcface", D, C, 0.4, margin_gradient="detached", seed=3)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-2}
    optimizer = torch.optim.SGD(head.parameters(), **options)
    weight = head.weight.detach().clone().requires_grad_()
    other = torch.optim.SGD([weight], **options)
    for step in range(3):
        feats, _, labels = _problem(step)
        optimizer.zero_grad()
        head(feats, labels).backward()
        head.weight.grad = head.weight.grad.to_dense()
        optimizer.step()
        index, _ = sample_classes(labels, C, int(0.4 * C), seed=3, rank=0, step=step)
        cosine = F.normalize(feats) @ F.normalize(weight[index]).T
        other.zero_grad()
        place = torch.searchsorted(index, labels)
        _combined_margin(cosine, place, (1.0, 0.5, 0.0)).backward()
        other.step()
        check_same("weights", head.weight.detach(), weight.detach(), SAME_GRADIENT)
    assert bool((weight.grad == 0).all(dim=1).any())
