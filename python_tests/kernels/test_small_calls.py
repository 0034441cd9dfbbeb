"""The host's work in a small step on the CPU, which is most of its time there: counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

import unitsface_kernels as uk
from bench.fake_device.calls import counted
from unitsface_kernels import dispatch

pytestmark = [
    pytest.mark.skipif(
        dispatch.unavailable("native", "cpu", torch.float32) is not None,
        reason="needs the native backend",
    ),
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11) or not torch.__version__.startswith("2.13."),
        reason="counted with Python 3.11 and Torch 2.13",
    ),
]


class Work(NamedTuple):
    """Calls of Python and of C functions, and operators of Torch, nested ones included."""

    calls: int
    operators: int


def _step(name: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    feats, weight, b = normal(64, 128), normal(256, 128), torch.tensor(0.5, requires_grad=True)
    labels, of_classes = torch.arange(64) % 16, torch.arange(256.0).requires_grad_()
    memory, memory_labels = weight.detach(), torch.arange(256) % 16
    losses: dict[str, Callable[[], Tensor]] = {
        "uss": lambda: uk.fused_uss_loss(feats, labels, b),
        "uss, memory": lambda: uk.fused_uss_loss(
            feats, labels, b, memory=memory, memory_labels=memory_labels
        ),
        "pair_softmax": lambda: uk.fused_pair_softmax_loss(feats, labels),
        "circle": lambda: uk.fused_circle_loss(feats, labels),
        "margin_softmax": lambda: uk.fused_margin_softmax_loss(feats, weight, labels),
        "uce": lambda: uk.fused_uce_loss(feats, weight, labels, of_classes),
    }

    def step() -> None:
        for leaf in (feats, weight, b, of_classes):
            leaf.grad = None
        losses[name]().backward()

    return step


#: A twentieth more than was counted.
MOST = {
    "uss": Work(475, 104),
    "uss, memory": Work(551, 125),
    "pair_softmax": Work(872, 304),
    "circle": Work(894, 207),
    "margin_softmax": Work(814, 191),
    "uce": Work(605, 155),
}


@pytest.mark.parametrize("name", MOST)
def test_work_of_a_small_step(name: str) -> None:
    """More is a regression; much less belongs into the table."""
    step = _step(name)
    for _ in range(3):  # what is kept between calls
        step()
    calls = sum(counted(step))
    with profile() as events:
        step()
    operators = sum(event.name.startswith("aten::") for event in events.function_events)
    found, most = Work(calls, operators), MOST[name]
    assert all(one <= bound < 2 * one for one, bound in zip(found, most, strict=True)), found
