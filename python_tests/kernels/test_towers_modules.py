"""Modules of the losses between two towers, and the errors of their functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import unitsface_kernels as uk


class _Sum(uk.policy.Pair):
    def negative(self, c):
        return c


class _Top(uk.policy.Pair):
    combine = "topk"

    def triplet(self, nearest, target):
        return nearest - target


def _towers(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(count, 12, generator=generator) for _ in range(2))
    return a, a + b


# --- modules --------------------------------------------------------------------------------------


def test_modules_learn_scale_and_bias() -> None:
    a, b = _towers(8)
    clip, siglip, nce = uk.CLIPLoss(), uk.SigLIPLoss(), uk.InfoNCELoss(learn_scale=True, both=True)
    torch.testing.assert_close(clip(a, b), uk.fused_clip_loss(a, b, 1 / 0.07))
    torch.testing.assert_close(siglip(a, b), uk.fused_siglip_loss(a, b, 10.0, -10.0))
    torch.testing.assert_close(nce(a, b), uk.fused_clip_loss(a, b, 20.0))
    for module in (clip, siglip, nce):
        module(a, b).backward()
        assert all(p.grad is not None and p.grad.isfinite() for p in module.parameters())
    state = siglip.state_dict()
    assert set(state) == {"log_scale", "bias"}
    other = uk.SigLIPLoss(scale=3.0, bias=1.0)
    other.load_state_dict(state)
    assert torch.equal(other(a, b), siglip(a, b))


def test_the_scale_is_cut_before_it_is_used() -> None:
    a, b = _towers(8)
    module = uk.CLIPLoss()
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    torch.testing.assert_close(module(a, b), uk.fused_clip_loss(a, b, 100.0))
    assert module.log_scale.item() == pytest.approx(math.log(100.0))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: uk.fused_clip_loss(a, b[:, :3], 5.0), "b must have D = 12 columns like a"),
        (lambda a, b: uk.fused_siglip_loss(a, b[:3], 5.0, 0.0), "b must have 6 rows like a"),
        (lambda a, b: uk.fused_clip_loss(a, b, 0.0), "scale must be > 0"),
        (lambda a, b: uk.fused_clip_loss(a, b, torch.tensor(-1.0)), "scale must be > 0"),
        (
            lambda a, b: uk.fused_siglip_loss(a, b, torch.ones(2), 0.0),
            "scale must have one element",
        ),
        (lambda a, b: uk.fused_siglip_loss(a, b, 5.0, torch.ones(2)), "bias must have one element"),
        (
            lambda a, b: uk.fused_info_nce_loss(a, b[:3], None, None, 5.0),
            "keys must have a row for",
        ),
        (
            lambda a, b: uk.fused_info_nce_loss(a, b, torch.arange(6), None, 5.0),
            "key_labels must be given together with labels",
        ),
        (
            lambda a, b: uk.fused_info_nce_loss(a, b, torch.arange(5), torch.arange(6), 5.0),
            r"labels must have shape \(6,\), one label per row of queries",
        ),
        (
            lambda a, b: uk.fused_info_nce_loss(a, b, torch.arange(6) - 2, torch.arange(6), 5.0),
            r"labels must be in \[-1, inf\)",
        ),
        (
            lambda a, b: uk.fused_info_nce_loss(a, b, None, None, 5.0, batch_offset=0),
            "batch_offset must be the place",
        ),
        (lambda a, b: uk.fused_clip_loss(a, b, 5.0, reduction="max"), "reduction must be one of"),
        (
            lambda a, b: uk.fused_pair_loss(_Sum(), a, torch.arange(6), both=True),
            "both must be False without memory",
        ),
        (
            lambda a, b: uk.fused_pair_loss(
                _Top(), a, torch.arange(6), memory=b, memory_labels=torch.arange(6), both=True
            ),
            'both must be False where combine is "topk"',
        ),
    ],
)
def test_value_errors(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*_towers(6))


def test_type_errors() -> None:
    a, b = _towers(6)
    for call in (
        lambda: uk.fused_clip_loss(a, b.tolist(), 5.0),
        lambda: uk.fused_clip_loss(a, b, "5"),
        lambda: uk.fused_clip_loss(a, b.double(), 5.0),
        lambda: uk.fused_info_nce_loss(a, b, None, None, 5.0, both=1),
        lambda: uk.CLIPLoss(learn_scale=1),
    ):
        with pytest.raises(TypeError):
            call()
