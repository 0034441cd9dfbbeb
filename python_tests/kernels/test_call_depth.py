"""Frames of Python between a public function and the first tile's kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

import unitsface_kernels as uk
from unitsface_kernels import dispatch, functional

MOST_FRAMES = 9
#: A tile's kernel begins with its GEMM, which the engine of the CPU has a few helpers for.
MOST_FRAMES_TO_GEMM = 14

pytestmark = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)


def _frames_to(kernel: str, call: Callable[[], object]) -> list[str]:
    """Names of the frames from the public function, the first, to the call into the extension."""
    found: list[list[str]] = []
    public = {getattr(functional, name).__code__ for name in functional.__all__}

    def watch(frame, event: str, function: object) -> None:
        if event != "c_call" or getattr(function, "__name__", "") != kernel:
            return
        stack = []
        while frame is not None:
            stack.append(frame.f_code.co_name)
            if frame.f_code in public:
                found.append(stack[::-1])
                return
            frame = frame.f_back

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert found, f"{kernel} was not called"
    return found[0]


def _operands(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(columns, 8, generator=generator, requires_grad=True)
    return rows, weight, torch.arange(6) % 3


def _sum() -> torch.Tensor:
    rows, _, labels = _operands(5)
    return uk.fused_uss_loss(rows, labels, torch.tensor(1.0, requires_grad=True), backend="native")


def _sum_of_classes() -> torch.Tensor:
    return uk.fused_sphereface2_loss(*_operands(5), 0.0, backend="native")


def _logsumexp() -> torch.Tensor:
    return uk.fused_margin_softmax_loss(*_operands(5), backend="native")


def _logsumexp_of_pairs() -> torch.Tensor:
    rows, _, labels = _operands(5)
    return uk.fused_pair_softmax_loss(rows, labels, backend="native")


def _nearest() -> torch.Tensor:
    return uk.fused_npt_loss(*_operands(5), backend="native")


def _sum_of_towers() -> torch.Tensor:
    rows, columns, _ = _operands(6)
    return uk.fused_siglip_loss(rows, columns, 10.0, -10.0, backend="native")


def _logsumexps_of_towers() -> torch.Tensor:
    rows, columns, _ = _operands(6)
    return uk.fused_clip_loss(rows, columns, 10.0, backend="native")


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        ("sum_tile", _sum),
        ("sum_tile", _sum_of_classes),
        ("logsumexp_tile", _logsumexp),
        ("pair_negatives_tile", _logsumexp_of_pairs),
        ("nearest_tile", _nearest),
        ("sum_tile", _sum_of_towers),
        ("pair_negatives_tile", _logsumexps_of_towers),
        ("normalize_rows", _sum),
        ("gemm", _sum),
        ("gemm", _logsumexp),
        ("gemm", _logsumexp_of_pairs),
    ],
)
def test_few_frames_to_the_launch(kernel: str, call: Callable[[], object]) -> None:
    frames = _frames_to(kernel, call)
    most = MOST_FRAMES_TO_GEMM if kernel == "gemm" else MOST_FRAMES
    assert len(frames) <= most, " > ".join(frames)
