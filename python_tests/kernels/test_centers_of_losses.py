"""Several centers per class in the losses that adapt: margins, hard negatives, scales, proxies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grid import extended_if
from support.helpers import FUSED, Target, patched_blocks
from support.tolerances import EXACT, SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk

N, C, K, D = 37, 29, 3, 20
NATIVE = Target("native", "cpu")
Loss = Callable[..., Tensor]
#: Functions, at scales at which other classes than the nearest count.
LOSSES: dict[str, Loss] = {
    "adaface": partial(uk.fused_adaface_loss, mean=4.0, std=1.0, scale=16.0),
    "magface": partial(uk.fused_magface_loss, scale=16.0, l_a=2.0, u_a=6.0),
    "elasticface": partial(
        uk.fused_elasticface_loss, margin=torch.linspace(0.1, 0.6, N), scale=16.0
    ),
    "class_margin": partial(
        uk.fused_class_margin_loss, margin=torch.linspace(0.1, 0.6, C), scale=16.0
    ),
    "curricularface": partial(uk.fused_curricularface_loss, t=0.3, scale=16.0),
    "mv_softmax": partial(uk.fused_mv_softmax_loss, scale=16.0),
    "adacos": partial(uk.fused_adacos_loss, scale=torch.tensor(9.0)),
    "proxy_nca": partial(uk.fused_proxy_nca_loss, denominator="all"),
}
#: Of every loss over classes that has a module of its own.
WITHOUT = {
    # Every class has a loss, whose vector is the row.
    "proxy_anchor": "rows",
    # Reads the norm of a class's one vector.
    "simple_proxy": "norm",
    # Compositions, whose class weights have other uses.
    **dict.fromkeys(("epl", "unpg", "vpl"), "composition"),
}


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(C, K, D, generator=generator)
    labels = torch.randint(-1, C, (N,), generator=generator)
    feats = torch.randn(N, D, generator=generator)
    return feats + weight[labels.clamp(min=0), 0] * (labels % 2)[:, None], weight, labels


def _run(
    loss: Loss,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    feats, weight, labels = (t.to(device) for t in _problem())
    feats, weight = (t.to(dtype).requires_grad_() for t in (feats, weight))
    given = {
        k: v.to(device) for k, v in getattr(loss, "keywords", {}).items() if torch.is_tensor(v)
    }
    found = loss(feats, weight, labels, backend=backend, centers=K, **given, **options)
    found.sum().backward()
    assert feats.grad is not None
    assert weight.grad is not None
    return [t.detach().cpu() for t in (found, feats.grad, weight.grad)]


def _check(found: list[Tensor], wanted: list[Tensor], allowed: tuple[float, float]) -> None:
    for name, got, want in zip(("loss", "feats", "weight"), found, wanted, strict=True):
        check_same(name, got, want, allowed[0] if name == "loss" else allowed[1])


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(
            *(target, name),
            id=f"{target}-{name}",
            marks=extended_if(target != NATIVE and name not in ("adaface", "mv_softmax")),
        )
        for target in FUSED
        for name in LOSSES
    ],
)
def test_every_loss(target: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not target.interpreted:
        patched_blocks(monkeypatch, (16, 7))
    options = {"reduction": "none" if name in ("magface", "adacos") else "mean"}
    wanted = _run(LOSSES[name], "reference", dtype=torch.float64, **options)
    found = _run(LOSSES[name], target.backend, target.device, **options)
    _check(found, wanted, (SAME_LOSS, SAME_GRADIENT))


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_the_nearest_centers(name: str) -> None:
    """With the centers that attain a row's maxima, one for each class, the loss of one center per
    class is the same."""
    feats, weight, labels = (t.double() if t.is_floating_point() else t for t in _problem())
    options = {"backend": "reference", "reduction": "none"}
    found = LOSSES[name](feats, weight, labels, centers=K, **options)
    units = F.normalize(weight, dim=2)
    for row in range(0, N, 5):
        nearest = (units @ F.normalize(feats[row], dim=0)).argmax(dim=1)
        of_row = weight[torch.arange(C), nearest]
        wanted = LOSSES[name](feats, of_row, labels, **options)[row]
        check_same(f"row {row}", found[row], wanted, EXACT)


def test_classes_are_read_from_rows_of_centers() -> None:
    """(C * K, D) is (C, K, D), and a subset counts classes."""
    feats, weight, labels = _problem()
    index = torch.tensor([17, 2, 28, 0, 9])
    labels = labels.clamp(max=4)
    options = {"class_index": index, "backend": "native", "centers": K}
    for name in ("curricularface", "class_margin"):
        one, other = (
            LOSSES[name](feats, w, labels, **options) for w in (weight, weight.flatten(0, 1))
        )
        assert torch.equal(one, other)
        wanted = LOSSES[name](
            *(feats.double(), weight.double(), labels), **{**options, "backend": "reference"}
        )
        check_same(name, one, wanted, SAME_LOSS)


@pytest.mark.parametrize("name", uk.CLASS_LOSSES)
def test_every_class_loss_takes_centers(name: str) -> None:
    cls = uk.CLASS_LOSSES[name]
    if name in WITHOUT:
        with pytest.raises(TypeError, match="centers"):
            cls(D, C, centers=K)
        return
    module: Any = cls(D, C, centers=K)
    assert module.weight.shape == (C, K, D)
    assert f"centers={K}" in repr(module)
    assert "centers" in inspect.signature(module.function).parameters
    feats, _, labels = _problem()
    module(feats, labels).backward()
    assert module.weight.grad.shape == (C, K, D)
    assert bool(module.weight.grad.any())
    for wrong in (0, 257):
        with pytest.raises(ValueError, match="centers must be"):
            cls(D, C, centers=wrong)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_statistics_are_those_of_the_nearest_centers(backend: str) -> None:
    """CurricularFace's t, AdaCos's scale and ElasticFace's order of margins."""
    feats, weight, labels = _problem()
    cosines = torch.einsum("nd,ckd->nck", F.normalize(feats), F.normalize(weight, dim=2))
    cosines, found = cosines.amax(dim=2), labels >= 0
    of_target = cosines[torch.arange(N), labels.clamp(min=0)][found]
    curricular = uk.CurricularFaceLoss(D, C, alpha=1.0, backend=backend, centers=K)
    adacos = uk.AdaCosLoss(D, C, backend=backend, centers=K)
    for module in (curricular, adacos):
        with torch.no_grad():
            module.weight.copy_(weight)
    first = float(adacos.scale)
    curricular(feats, labels).backward()
    adacos(feats, labels).backward()
    torch.testing.assert_close(curricular.t, of_target.mean())
    others = torch.ones(N, C, dtype=torch.bool).scatter(1, labels.clamp(min=0)[:, None], False)
    total = (torch.exp(first * cosines) * others)[found].sum() / found.sum()
    middle = torch.cos(torch.acos(of_target).median()).clamp(min=0.5**0.5)
    torch.testing.assert_close(adacos.scale, total.log() / middle)
    elastic = uk.ElasticFaceLoss(D, C, assignment="sorted", backend=backend, centers=K)
    with torch.no_grad():
        elastic.weight.copy_(weight)
    margins = elastic.step_variables(feats, labels, lambda t: t)["margin"][found]
    assert torch.equal(of_target.argsort(descending=True), margins.argsort())


class WithNorms(uk.policy.Class):
    def negative(self, c):
        return c * self.column_norm


def test_norms_of_classes_have_one_vector() -> None:
    feats, weight, labels = _problem()
    message = "centers must be 1 for WithNorms, which reads the norm"
    with pytest.raises(ValueError, match=message):
        uk.fused_class_loss(WithNorms(), feats, weight, labels, centers=K)
    with pytest.raises(ValueError, match=message):
        uk.ClassLoss(WithNorms(), D, C, centers=K)
    with pytest.raises(ValueError, match=message):
        uk.PartialFC(WithNorms(), D, C, centers=K)
