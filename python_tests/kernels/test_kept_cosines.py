"""Cosines that wait for the backward pass in the memory of the class gradient."""

from __future__ import annotations

import pytest
import torch
from support.helpers import patched_blocks
from torch import Tensor

from unitsface_kernels import fused_margin_softmax_loss
from unitsface_kernels.backends.native.cpu_engine import CpuEngine


def _run(feats: Tensor, weight: Tensor, labels: Tensor, **options) -> tuple[Tensor, ...]:
    feats, weight = feats.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fused_margin_softmax_loss(feats, weight, labels, backend="native", **options)
    return loss.detach(), *torch.autograd.grad(loss, (feats, weight))


def _count_gemms(monkeypatch) -> list[tuple[int, ...]]:
    gemms: list[tuple[int, ...]] = []
    method = CpuEngine.cosines

    def counted(self, a, b, *out):
        gemms.append((a.shape[0], b.shape[0]))
        return method(self, a, b, *out)

    monkeypatch.setattr(CpuEngine, "cosines", counted)
    return gemms


# More rows than features: only the first blocks find room. 24 features, blocks of 10 rows.
@pytest.mark.parametrize(("rows", "again"), [(7, 0), (20, 0), (24, 0), (25, 1), (45, 3)])
@pytest.mark.parametrize("subset", [False, True])
def test_equals_multiplying_again(rows: int, again: int, subset: bool, monkeypatch) -> None:
    patched_blocks(monkeypatch, (10, 16))
    feats, weight = torch.randn(rows, 24), torch.randn(50, 24)
    options = {"class_index": torch.randperm(50)[:33]} if subset else {}
    classes = 33 if subset else 50
    labels = torch.randint(-1, classes, (rows,))
    gemms = _count_gemms(monkeypatch)
    found = _run(feats, weight, labels, **options)
    tiles, blocks = -(-classes // 16), -(-rows // 10)
    assert len(gemms) == tiles * (blocks + again)
    monkeypatch.setattr(CpuEngine, "keeps_cosines", False)
    for kept, multiplied in zip(found, _run(feats, weight, labels, **options), strict=True):
        assert torch.equal(kept, multiplied)


def test_takes_no_memory_of_its_own(monkeypatch) -> None:
    """The gradient is what the cosines lay in."""
    given = []
    method = torch.Tensor.new_empty

    def new_empty(self, *arguments, **options):
        result = method(self, *arguments, **options)
        if tuple(result.shape) == (50, 24):
            given.append(result.data_ptr())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    weight = torch.randn(50, 24, requires_grad=True)
    feats = torch.randn(9, 24)
    fused_margin_softmax_loss(feats, weight, torch.arange(9), backend="native").backward()
    assert weight.grad is not None
    assert given == [weight.grad.data_ptr()]


@pytest.mark.parametrize("need", ["feats", "weight"])
def test_one_gradient_only(need: str) -> None:
    feats, weight, labels = torch.randn(9, 24), torch.randn(50, 24), torch.arange(9)
    _, *both = _run(feats, weight, labels)
    leaf = {"feats": feats, "weight": weight}[need].requires_grad_()
    loss = fused_margin_softmax_loss(feats, weight, labels, backend="native")
    (found,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found, both[0 if need == "feats" else 1])


def test_half_precision_weights_have_no_room() -> None:
    feats, weight = torch.randn(9, 24), torch.randn(50, 24).bfloat16()
    loss, _, d_weight = _run(feats, weight, torch.arange(9))
    assert d_weight.dtype == torch.bfloat16
    assert bool(loss.isfinite())


def test_graph_without_backward_and_in_place_change() -> None:
    """A forward pass alone leaves nothing behind; weights changed in between are an error."""
    feats, weight = torch.randn(9, 24), torch.randn(50, 24, requires_grad=True)
    loss = fused_margin_softmax_loss(feats, weight, torch.arange(9), backend="native")
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
