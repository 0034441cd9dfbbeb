"""Classes of several centers: the published formula, every loss, engine and form of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grid import extended_if
from support.helpers import FUSED, TARGETS, Target, patched_blocks
from support.own_policies import Cosine
from support.tolerances import (
    AUTOCAST_GRADIENT,
    AUTOCAST_LOSS,
    EXACT,
    SAME_GRADIENT,
    SAME_LOSS,
    check_same,
)
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels import policy
from unitsface_kernels.backends import native
from unitsface_kernels.backends.eager import EagerEngine
from unitsface_kernels.backends.streaming.centers import CenterTiles

N, C, D = 37, 29, 20
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_fused = pytest.mark.parametrize("target", FUSED, ids=str)
NATIVE = Target("native", "cpu")


class FromTarget(policy.Class):
    """A weight of the negatives by the target's cosine."""

    combine = "logsumexp"
    scale: policy.Number = 16.0

    def positive(self, c):
        return self.scale * (c - 0.3)

    def negative(self, c):
        return self.scale * c + self.target_cosine


def _margin(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_margin_softmax_loss(feats, weight, labels, m2=0.5, **options)


def _uce(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_uce_loss(feats, weight, labels, 2.0, **options)


def _bce(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    b = torch.linspace(-1.0, 3.0, C, device=feats.device, dtype=feats.dtype)
    return uk.fused_uce_loss(feats, weight, labels, b, **options)


def _sphereface2(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_sphereface2_loss(feats, weight, labels, 0.3, **options)


def _npt(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_npt_loss(feats, weight, labels, k=4, **options)


def _own(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_class_loss(Cosine(), feats, weight, labels, **options)


def _from_target(feats: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return uk.fused_class_loss(FromTarget(), feats, weight, labels, **options)


Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "margin": _margin,
    "uce": _uce,
    "bce": _bce,
    "sphereface2": _sphereface2,
    "npt": _npt,
}


def _problem(centers: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + centers)
    weight = torch.randn(C, centers, D, generator=generator)
    labels = torch.randint(-1, C, (N,), generator=generator)
    feats = torch.randn(N, D, generator=generator)
    return feats + weight[labels.clamp(min=0), 0] * (labels % 2)[:, None], weight, labels


def _run(
    loss: Loss,
    backend: str,
    centers: int = 3,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Loss, and the gradients of features and weights for a fixed upstream gradient."""
    feats, weight, labels = (t.to(device) for t in tensors or _problem(centers))
    feats, weight = feats.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    found = loss(feats, weight, labels, centers=centers, backend=backend, **options)
    upstream = torch.linspace(0.5, 1.5, found.numel(), device=device).view(found.shape)
    found.backward(upstream.to(found.dtype))
    assert feats.grad is not None
    assert weight.grad is not None
    return [t.detach().cpu() for t in (found, feats.grad, weight.grad)]


#: Name, centers and options.
EVERY: list[tuple[str, int, dict[str, Any]]] = [
    ("margin", 5, {"reduction": "none"}),
    *((name, 3, {"reduction": "sum"}) for name in ("uce", "bce", "npt")),
    ("margin", 2, {}),
    ("sphereface2", 4, {}),
    ("bce", 2, {"reduction": "none"}),
    ("npt", 2, {"reduction": "none"}),
]


def _check(found: list[Tensor], wanted: list[Tensor]) -> None:
    for name, got, want in zip(("loss", "feats", "weight"), found, wanted, strict=True):
        check_same(name, got, want, SAME_LOSS if name == "loss" else SAME_GRADIENT)


@each_target
@pytest.mark.parametrize("form", ["C x K x D", "C K x D"])
def test_published_formula(target: Target, form: str) -> None:
    """Sub-center ArcFace as in insightface, recognition/subcenter_arcface/train_parall.py,
    ``get_symbol_arcface``: fully connected of unit vectors with C K rows, reshaped to (N, C, K),
    the maximum over the last axis, the margin on the target's angle, softmax cross-entropy.
    """
    feats, weight, labels = _problem(3)
    labels = labels.clamp(min=0)
    x, w = feats.double().requires_grad_(), weight.double().requires_grad_()
    products = F.linear(F.normalize(x), F.normalize(w.view(C * 3, D)))
    cosine = products.view(N, C, 3).amax(dim=2)
    rows = torch.arange(N)
    shifted = torch.cos(torch.acos(cosine[rows, labels]) + 0.5)
    F.cross_entropy(64.0 * cosine.index_put((rows, labels), shifted), labels).backward()
    expected = F.cross_entropy(64.0 * cosine.index_put((rows, labels), shifted), labels)
    given = weight if form == "C x K x D" else weight.flatten(0, 1)
    found = _run(
        _margin, target.backend, device=target.device, tensors=(feats, given, labels), m3=0.0
    )
    assert found[2].shape == given.shape
    assert x.grad is not None
    assert w.grad is not None
    _check(found, [expected.detach(), 0.5 * x.grad, 0.5 * w.grad.view(given.shape)])


@pytest.mark.parametrize(
    ("target", "blocks", "name", "centers", "options"),
    [
        pytest.param(
            *(target, blocks, *case),
            id=f"{target}-{blocks}-{case[0]}-{case[1]}",
            # In Triton's interpreter a tile takes as long as all others together.
            marks=extended_if(case not in EVERY[:4] or (target.interpreted and bool(blocks))),
        )
        for target in FUSED
        for blocks in (None, (16, 7))
        for case in EVERY
    ],
)
def test_every_loss(
    target: Target,
    blocks: tuple[int, int] | None,
    name: str,
    centers: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if blocks is not None:
        patched_blocks(monkeypatch, blocks)
    wanted = _run(LOSSES[name], "reference", centers, dtype=torch.float64, **options)
    _check(_run(LOSSES[name], target.backend, centers, device=target.device, **options), wanted)


@each_fused
@pytest.mark.parametrize("name", ["margin", "bce", "npt"])
def test_subset_of_classes(target: Target, name: str) -> None:
    """``class_index`` counts classes, and all centers of each follow."""
    index = torch.tensor([17, 2, 28, 0, 9])
    feats, weight, labels = _problem(3)
    tensors = (feats, weight, labels.clamp(max=len(index) - 1))
    wanted = _run(
        LOSSES[name], "reference", dtype=torch.float64, tensors=tensors, class_index=index
    )
    found = _run(
        LOSSES[name], target.backend, device=target.device, tensors=tensors, class_index=index
    )
    _check(found, wanted)
    others = torch.ones(C, dtype=torch.bool).index_fill_(0, index, False)
    assert not bool(found[2][others].any())


@pytest.mark.parametrize(
    ("loss", "compiler"),
    [
        (_own, "off"),
        pytest.param(_own, "", marks=pytest.mark.extended),
        (_from_target, "off"),
        pytest.param(_from_target, "", marks=pytest.mark.extended),
    ],
)
@pytest.mark.filterwarnings("ignore:.*UNITSFACE_POLICY_COMPILER")
def test_own_losses(loss: Loss, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled at their first use, or in eager tiles."""
    if compiler:
        monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", compiler)
    patched_blocks(monkeypatch, (16, 7))
    _check(_run(loss, "native"), _run(loss, "reference", dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_eager_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "make_engine", lambda call, *_: EagerEngine(call))
    patched_blocks(monkeypatch, (16, 7))
    _check(_run(LOSSES[name], "native"), _run(LOSSES[name], "reference", dtype=torch.float64))


@each_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(target: Target, dtype: torch.dtype) -> None:
    wanted = _run(_margin, "reference", dtype=torch.float64)
    found = _run(_margin, target.backend, device=target.device, dtype=dtype)
    for got, want in zip(found, wanted, strict=True):
        check_same("half", got, want, AUTOCAST_GRADIENT if got.dim() else AUTOCAST_LOSS)


@each_target
@pytest.mark.parametrize("name", ["margin", "uce", "npt"])
def test_ties_go_to_the_first(target: Target, name: str) -> None:
    """Equal centers are one class with one center, which the first of them is."""
    feats, weight, labels = _problem(1)
    wanted = _run(LOSSES[name], target.backend, 1, device=target.device)
    tensors = (feats, weight.expand(C, 3, D).clone(), labels)
    found = _run(LOSSES[name], target.backend, 3, device=target.device, tensors=tensors)
    assert not bool(found[2][:, 1:].any())
    _check([*found[:2], found[2][:, :1]], wanted)


@each_target
def test_one_center_is_the_call_without(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and no kernel of several centers."""

    def none(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(CenterTiles, "_take_largest", none)
    monkeypatch.setattr(CenterTiles, "_spread", none)
    for name in ("margin", "uce") if target.interpreted else LOSSES:
        loss = LOSSES[name]
        feats, weight, labels = _problem(1)
        tensors = (feats, weight[:, 0], labels)
        with_one = _run(loss, target.backend, 1, device=target.device)
        plain = _run(loss, target.backend, 1, device=target.device, tensors=tensors)
        assert torch.equal(with_one[0], plain[0])
        assert torch.equal(with_one[1], plain[1])
        assert torch.equal(with_one[2][:, 0], plain[2])


@each_target
def test_center_that_is_not_finite(target: Target) -> None:
    feats, weight, labels = _problem(3)
    weight[4, 1, 2] = torch.nan
    for name in ("margin", "uce", "npt"):
        loss, *gradients = _run(
            LOSSES[name],
            target.backend,
            device=target.device,
            tensors=(feats, weight, labels),
            reduction="none",
        )
        assert bool(loss[labels >= 0].isnan().all()), name
        assert not bool(loss[labels < 0].any())
        assert not all(bool(g.isfinite().all()) for g in gradients)


@each_target
def test_gradients_are_derivatives(target: Target) -> None:
    """The nearest center of every class is perturbed; the others are constants."""
    feats, weight, labels = _problem(4)
    _, _, gradient = _run(_margin, target.backend, 4, device=target.device, reduction="none")
    products = torch.einsum("nd,ckd->nck", F.normalize(feats), F.normalize(weight, dim=2))
    attained = torch.zeros(C, 4, dtype=torch.bool)
    rows = (labels >= 0).nonzero()[:, 0]
    attained[torch.arange(C).expand(len(rows), C), products[rows].argmax(dim=2)] = True
    assert torch.equal((gradient != 0).any(dim=2), attained)


@each_fused
def test_skip_tolerance_is_ignored(target: Target) -> None:
    found = _run(_margin, target.backend, device=target.device, skip_tolerance=0.5)
    wanted = _run(_margin, target.backend, device=target.device)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(
            *(target, name),
            id=f"{target}-{name}",
            marks=extended_if((target, name) != (NATIVE, "margin")),
        )
        for target in TARGETS
        for name in ("margin", "bce")
    ],
)
def test_compiled(target: Target, name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    index = torch.tensor([17, 2, 28, 0, 9, 11])
    feats, weight, labels = _problem(3)
    tensors = (feats, weight, labels.clamp(max=5))
    options: dict[str, Any] = {"device": target.device, "tensors": tensors, "class_index": index}
    _check(_run(compiled, target.backend, **options), _run(LOSSES[name], target.backend, **options))


@pytest.mark.parametrize("name", ["margin", "uce"])
def test_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``UNITSFACE_CHECK=1`` changes nothing, and names a center that is not finite."""
    wanted = _run(LOSSES[name], "native")
    monkeypatch.setenv("UNITSFACE_CHECK", "1")
    found = _run(LOSSES[name], "native")
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    feats, weight, labels = _problem(3)
    weight[4, 1, 2] = torch.inf
    with pytest.raises(FloatingPointError, match="class weights are not finite in rows 13 "):
        _run(LOSSES[name], "native", tensors=(feats, weight, labels))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"centers": 0}, ValueError, "centers must be >= 1, got 0"),
        ({"centers": 257}, ValueError, "centers must be <= 256, got 257"),
        ({"centers": 2.0}, TypeError, "centers must be an int, got float"),
        ({"centers": 2}, ValueError, r"weight must have shape \(C, 2, D\), got \(29, 3, 20\)"),
        (
            {"centers": 4, "weight": torch.zeros(C, D)},
            ValueError,
            r"weight must have C \* centers rows, a multiple of 4, got 29",
        ),
        ({"centers": 1}, ValueError, r"weight must have shape \(rows, D\)"),
        ({"weight": torch.zeros(C, 3, D + 1)}, ValueError, "weight must have D = 20"),
        ({"weight": torch.zeros(2, C, 3, D)}, ValueError, "weight must have shape"),
        ({"labels": torch.full((N,), C)}, ValueError, "labels must be in"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    feats, weight, labels = _problem(3)
    given = {"weight": weight, "labels": labels, "centers": 3, **change}
    with pytest.raises(error, match=message):
        uk.fused_margin_softmax_loss(feats, given.pop("weight"), given.pop("labels"), **given)


def test_module() -> None:
    module = uk.SubCenterArcFaceLoss(D, C)
    assert module.weight.shape == (C, 3, D)
    assert "centers=3" in repr(module)
    assert (module.scale, module.m2) == (64.0, 0.5)
    feats, weight, labels = _problem(3)
    with torch.no_grad():
        module.weight.copy_(weight)
    same = uk.ArcFaceLoss(D, C, centers=3)
    same.load_state_dict(module.state_dict())
    wanted = uk.fused_margin_softmax_loss(feats, weight, labels, m2=0.5, m3=0.0, centers=3)
    assert torch.equal(module(feats, labels), wanted)
    assert torch.equal(same(feats, labels), wanted)
    for cls in (uk.UCELoss, uk.ClassBCELoss, uk.SphereFace2Loss, uk.NPTLoss, uk.CosFaceLoss):
        several = cls(D, C, centers=2)
        several(feats, labels).backward()
        assert several.weight.grad is not None
        assert several.weight.grad.shape == (C, 2, D)
    own = uk.ClassLoss(Cosine(), D, C, centers=2)
    assert own.weight.shape == (C, 2, D)
    assert math.isfinite(own(feats, labels).item())
    for wrong in (0, 300):
        with pytest.raises(ValueError, match="centers must be"):
            uk.SubCenterArcFaceLoss(D, C, centers=wrong)


@pytest.mark.extended
def test_second_derivatives_of_the_reference() -> None:
    feats, weight, labels = (t.double() if t.is_floating_point() else t for t in _problem(2))
    feats, weight = feats[:4].requires_grad_(), weight[:5].clone().requires_grad_()
    labels = labels[:4].clamp(max=4)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return uk.fused_margin_softmax_loss(
            x, w, labels, scale=2.0, m3=0.2, centers=2, backend="reference"
        )

    assert torch.autograd.gradgradcheck(loss, (feats, weight), atol=EXACT**0.5)
