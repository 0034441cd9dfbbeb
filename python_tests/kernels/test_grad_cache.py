"""Gradients in chunks are those of one pass over the whole batch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import unitsface_kernels as uk
from unitsface_kernels.grad_cache import cached_backward


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))


def test_gradients_are_those_of_one_pass() -> None:
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    first, second, loss = _model(), _model(), uk.CLIPLoss()
    want = loss(first(x), second(y))
    (3.0 * want).backward()
    modules = [first, second, loss]
    expected = [p.grad.clone() for m in modules for p in m.parameters()]
    for module in modules:
        module.zero_grad()
    inside: list[bool] = []

    @contextmanager
    def no_sync():
        inside.append(True)
        yield

    got = cached_backward(
        [first, second], [x.split(4), y.split(3)], loss, factor=3.0, no_sync=no_sync
    )
    torch.testing.assert_close(got, want.detach())
    found = [p.grad for m in modules for p in m.parameters()]
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert not got.requires_grad
    assert len(inside) == 3 + 4 - 1


def test_a_chunk_has_the_same_random_numbers_twice() -> None:
    """Dropout: with other numbers the second pass would have other zeros."""
    seen: dict[int, list[torch.Tensor]] = {}
    model, dropout = _model(), nn.Dropout(0.5)

    def encoder(chunk: torch.Tensor) -> torch.Tensor:
        features = dropout(model(chunk))
        seen.setdefault(chunk.data_ptr(), []).append(features.detach())
        return features

    x = torch.randn(8, 6)
    before = torch.get_rng_state()
    cached_backward([encoder, encoder], [x.split(4), x.flip(0).split(4)], uk.SigLIPLoss())
    assert not torch.equal(before, torch.get_rng_state())
    assert len(seen) == 4
    for first, again in seen.values():
        assert torch.equal(first, again)


def test_errors() -> None:
    x, model = torch.randn(4, 6), _model()
    with pytest.raises(ValueError, match="encoders must be 2, one for each tower, got 1"):
        cached_backward([model], [[x], [x]], uk.CLIPLoss())
    with pytest.raises(ValueError, match="chunks must have one or more of each tower, got 0"):
        cached_backward([model, model], [[x], []], uk.CLIPLoss())
