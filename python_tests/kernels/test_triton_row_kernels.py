"""Triton's kernels over rows: formulas of rows, statistics of norms, and draws."""

from __future__ import annotations

import math

import pytest
import torch
from support.triton_tiles import DEVICE
from support.variables import Curricular, Margins

from unitsface_kernels import draws
from unitsface_kernels.backends import norms
from unitsface_kernels.backends.streaming import (
    Call,
    ClassSums,
    TargetWeights,
    Variables,
    logsumexp,
    row_formulas,
)
from unitsface_kernels.backends.triton import draws as draw_kernels
from unitsface_kernels.backends.triton import norms as norm_kernels
from unitsface_kernels.backends.triton.engine import TritonEngine
from unitsface_kernels.losses import LossSpec, adaface, custom, magface

ROWS, CLASSES = 150, 7


def _call(spec: LossSpec) -> tuple[Call, Variables]:
    """Rows that are ignored, without a target, and of every class."""
    generator = torch.Generator().manual_seed(3)
    feats, weight = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (ROWS, CLASSES))
    labels = torch.arange(-2, ROWS - 2, device=DEVICE).clamp(max=-1)
    labels = torch.where(
        labels == -1, torch.arange(ROWS, device=DEVICE) % (CLASSES + 1) - 1, labels
    )
    sides = [variable.side for variable in spec.variables]
    counts = (sides.count("scalar"), (sides.count("row"), ROWS), (sides.count("column"), CLASSES))
    values = Variables(*(0.3 + torch.rand(n, generator=generator).to(DEVICE) for n in counts))
    if spec is magface.SPEC:
        # Norms between the bounds.
        values.rows.mul_(80.0)
    params = spec.pack(spec.defaults())
    static = (spec, params, "mean", "triton", torch.float32, None, 0.0, True, True)
    return Call(*static, rows=feats, row_labels=labels, columns=weight), values


SPECS = {
    "adaface": adaface.SPEC,
    "magface": magface.SPEC,
    "margins": custom.spec(Margins()),
    "curricular": custom.spec(Curricular()),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rows_are_finished_as_by_torch(spec: LossSpec) -> None:
    call, values = _call(spec)
    generator = torch.Generator().manual_seed(4)
    maximum, total = (5 * torch.rand(3, ROWS, generator=generator).to(DEVICE) for _ in range(2))
    maximum[1, ::5], total[1, ::5] = -torch.inf, 0.0
    sums = ClassSums(maximum, total, torch.linspace(-1.0, 1.0, ROWS, device=DEVICE))
    for place in (None, 7):
        if place is not None and len(values.rows):
            values.rows[0, place] = torch.nan
        found = TritonEngine(call).finish_rows(call, sums, values)
        wanted = logsumexp.finish_rows(call, sums, values=values)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-5, equal_nan=True)
        assert bool(found[0].isnan().any()) == (place is not None and len(values.rows) > 0)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_slopes_of_rows_as_by_torch(spec: LossSpec) -> None:
    call, values = _call(spec)
    generator = torch.Generator().manual_seed(5)
    target, rows = (torch.rand(ROWS, generator=generator).to(DEVICE) for _ in range(2))
    target[::4] = 0.0
    cosine = torch.linspace(-0.99, 0.99, ROWS, device=DEVICE)
    weights = TargetWeights(-target, cosine, rows, torch.zeros_like(rows))
    found = TritonEngine(call).row_slopes(call, values, weights)
    wanted = row_formulas.row_slopes(call, values, weights)
    assert found.shape == (len(spec.variables), ROWS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # The quality of AdaFace is a constant of the gradient.
    assert bool(found.any()) == (spec is not adaface.SPEC)


# --- statistics of norms --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_norms(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    feats = (10.0 ** torch.randn(90, 1, generator=generator)) * torch.randn(90, width)
    labels = torch.arange(90) % 4 - 1
    feats[labels == -1] = torch.nan
    feats, labels = feats.to(DEVICE, dtype), labels.to(DEVICE)
    found, wanted = (m.norm_sums(feats, labels, 1e-3, 100.0) for m in (norm_kernels, norms))
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found.sum(0), wanted.sum(0), rtol=1e-12, atol=0.0)
    kept = labels != -1
    found = norm_kernels.norm_sums(feats[kept], labels[kept].to(torch.uint8), 1e-3, 100.0)
    torch.testing.assert_close(found.sum(0), wanted.sum(0), rtol=1e-12, atol=0.0)
    feats[1, 0] = torch.inf
    for module in (norm_kernels, norms):
        count, *others = module.norm_sums(feats, labels, 1e-3, 100.0).sum(0)
        assert int(count) == int((labels != -1).sum())
        assert all(other.isnan() for other in others)


@pytest.mark.parametrize("share", [0.01, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_statistics_move(share: float, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(count, 5, generator=generator).to(DEVICE)
    labels = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    kept = torch.tensor([20.0, 100.0], device=DEVICE)
    sums = norm_kernels.norm_sums(feats, labels, 1e-3, 100.0)
    assert sums.shape[0] >= 1
    of = feats.double().norm(dim=1)
    batch = [float(of.mean()), float(of.std()) if count > 1 else math.nan]
    moved = [k + share * (b - k) for k, b in zip((20.0, 100.0), batch, strict=True)]
    wanted = [k if math.isnan(m) else m for k, m in zip((20.0, 100.0), moved, strict=True)]
    for module in (norm_kernels, norms):
        found = module.moved_statistics(sums, kept[0], kept[1].clone(), share)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), torch.tensor(wanted), rtol=3e-7, atol=0.0)


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_draws_are_those_of_torch(seed: int) -> None:
    draw = torch.tensor(12345678901, device=DEVICE)
    for first, count in (0, 300), (2**32 - 5, 10), (2**20, 1), (5, 0):
        found = draw_kernels.centered(seed, draw, first, count)
        assert torch.equal(found.cpu(), draws.centered(seed, draw.cpu(), first, count))
