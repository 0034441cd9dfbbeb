"""Tiles of the Triton engine, one at a time, against float64 and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.triton_tiles import DEVICE, TOLERANCE, make_call, poison, relative
from torch import Tensor

from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.reference import cosines
from unitsface_kernels.backends.streaming import ClassSums, ClassTile, ClassWeights
from unitsface_kernels.backends.triton import launch
from unitsface_kernels.backends.triton.engine import TritonEngine
from unitsface_kernels.backends.triton.kernels.tiles import (
    grouped_block,
    triangle_block,
)

triton = pytest.importorskip("triton")
tl = triton.language

__all__ = ["poison"]


def statistics(
    engine: TritonEngine, rows: Tensor, columns: Tensor, targets: Tensor, waves: list[int]
) -> ClassSums:
    count = rows.shape[0]
    unit, _ = engine.normalize_rows(rows, 0, count)
    # Of each wave on its own, as drivers have them. What was there before is not read.
    maximum, total = torch.full((2, len(waves) - 1, count), torch.nan, device=DEVICE)
    cosine = torch.zeros(count, device=DEVICE)
    for k, (start, stop) in enumerate(itertools.pairwise(waves)):
        tile, _ = engine.normalize_rows(columns, start, stop, reuse=True)
        sums = ClassSums(maximum[k], total[k], cosine)
        engine.logsumexp_tile(ClassTile(unit, tile, targets, start), sums)
    largest = maximum.amax(0)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    return ClassSums(largest, (total * torch.exp(maximum - shift)).sum(0), cosine)


@pytest.mark.parametrize("scale", [8.0, 2000.0])
def test_logsumexp_statistics_over_waves(scale: float) -> None:
    """At the larger scale most terms underflow; the largest of each row must not."""
    rows, columns = torch.randn(45, 50, device=DEVICE), torch.randn(150, 50, device=DEVICE)
    targets = torch.arange(45, device=DEVICE) * 3
    targets[:3] = torch.tensor([-1, -2, 149])
    engine = TritonEngine(make_call("margin_softmax", rows, columns, scale=scale), gradients=False)
    maximum, total, target_cosine = statistics(engine, rows, columns, targets, [0, 64, 65, 150])
    cosine = cosines(rows.double(), columns.double())
    present = targets >= 0
    is_target = torch.zeros_like(cosine, dtype=torch.bool)
    is_target[present, targets[present]] = True
    want = torch.logsumexp((scale * cosine).masked_fill(is_target, -torch.inf), 1)
    assert relative(maximum + torch.log(total), want) < 3e-6
    assert relative(target_cosine[present], cosine[is_target]) < 3e-6
    assert torch.equal(target_cosine[~present], torch.zeros(2, device=DEVICE))


def test_logsumexp_row_without_negatives() -> None:
    rows = torch.randn(3, 50, device=DEVICE)
    engine = TritonEngine(make_call("margin_softmax", rows, rows[:1]), gradients=False)
    targets = torch.tensor([0, -1, 0], device=DEVICE)
    maximum, total, _ = statistics(engine, rows, rows[:1], targets, [0, 1])
    assert torch.equal(maximum.isinf(), targets == 0)
    assert torch.equal(total, (targets != 0).float())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logsumexp_gradient_tile(dtype: torch.dtype) -> None:
    """In float16 with the slopes that a margin has next to the class's own weight."""
    rows, columns = (torch.randn(n, 50, device=DEVICE).to(dtype) for n in (45, 101))
    targets = torch.arange(45, device=DEVICE) + 4
    targets[:2] = torch.tensor([-2, 200])
    call = make_call("margin_softmax", rows, columns, scale=16.0)
    engine = TritonEngine(call)
    a, _ = engine.normalize_rows(rows, 0, 45)
    b, _ = engine.normalize_rows(columns, 0, 101, reuse=True)
    logits = 16.0 * (a.double() @ b.double().T)
    log_negatives = torch.logsumexp(logits, 1)
    weight = torch.rand(45, device=DEVICE)
    own = -weight * torch.linspace(1.0, 3e5, 45, device=DEVICE)
    start = 3
    tile = engine.logsumexp_gradient_tile(
        ClassTile(a, b, targets, start), ClassWeights(log_negatives.float(), weight, own)
    )
    want = 16.0 * weight[:, None] * torch.exp(logits - log_negatives[:, None])
    want[torch.arange(2, 45), targets[2:] - start] = own[2:].double()
    assert tile.isfinite().all()
    assert relative(engine.matmul(tile, b), want @ b.double()) < TOLERANCE[dtype]


def test_float16_keeps_gradients_below_its_own_range() -> None:
    rows, columns = (torch.randn(n, 50, device=DEVICE).half() for n in (40, 60))
    engine = TritonEngine(make_call("margin_softmax", rows, columns, scale=1.0))
    a, _ = engine.normalize_rows(rows, 0, 40)
    b, _ = engine.normalize_rows(columns, 0, 60, reuse=True)
    nothing = torch.zeros(40, device=DEVICE)
    targets = torch.full((40,), -2, device=DEVICE)
    weight = torch.full((40,), 1e-8, device=DEVICE)
    tile = engine.logsumexp_gradient_tile(
        ClassTile(a, b, targets, 0), ClassWeights(nothing, weight, nothing)
    )
    want = 1e-8 * torch.exp(a.double() @ b.double().T) @ b.double()
    assert relative(engine.matmul(tile, b), want) < 4e-2


@pytest.mark.parametrize("parameters", [
    {"m2": 0.0},
    {"m2": 0.5, "m3": 0.0},
    {"m2": -0.4, "m3": 0.1},
    {"m2": 4.0},
    {"m1": 1.7, "m3": 0.0},
    {"m1": 2.3, "m2": 0.9},
    {"m1": 5.0, "margin_gradient": "detached"},
], ids=str)  # fmt: skip
def test_margin_policy(parameters: dict[str, float | str]) -> None:
    """Against its eager formula, everywhere including the ends, where rounding leaves [-1, 1]."""
    ends = torch.tensor([1.0, -1.0, 1.0000001, -1.0000001, 1 - 6e-8, 6e-8 - 1, torch.nan])
    cosine = torch.cat([torch.linspace(-1, 1, 999), ends]).to(DEVICE)
    call = make_call("margin_softmax", cosine[:, None], **parameters)
    # Negatives far above every logit: the loss is their distance.
    above, one = cosine.new_full((1, len(cosine)), 100.0), torch.ones_like(cosine)[None]
    losses, (_, _, slopes) = TritonEngine(call).finish_rows(call, ClassSums(above, one, cosine))
    logits = 100.0 - losses
    results = {}
    for dtype in (torch.float64, torch.float32):
        x = cosine.to(dtype).requires_grad_()
        want = call.spec.positive(x, None, call.params)
        results[dtype] = want.detach(), torch.autograd.grad(want.sum(), x)[0]
    assert logits[-1].isnan()
    for got, want, eager in zip((logits, slopes), *results.values(), strict=True):
        got, want, eager = got[:-1].double(), want[:-1], eager[:-1].double()
        # Next to theta = 0 the slope amplifies the cosine's rounding, in eager as well.
        scale = want.abs() + 64.0
        eager_error = ((eager - want).abs() / scale).max()
        assert ((got - want).abs() / scale).max() < 1e-6 + 6 * eager_error


@pytest.mark.parametrize("width", [1, 48, 513, 1100])
@pytest.mark.parametrize("indexed", [False, True])
def test_normalize_rows_and_their_jacobian(width: int, indexed: bool) -> None:
    source = torch.randn(30, width, device=DEVICE)
    source[4], source[7] = 0.0, 1e-7 * torch.ones(width, device=DEVICE)
    index = torch.randperm(30, device=DEVICE)[:20] if indexed else None
    if index is not None:
        index[:2] = torch.tensor([4, 7])
    start, stop = (0, 19) if indexed else (3, 30)
    engine = TritonEngine(make_call("uss", source))
    unit, inverse = engine.normalize_rows(source, start, stop, index)
    rows = (source if index is None else source[index])[start:stop].double().requires_grad_()
    want = torch.nn.functional.normalize(rows, dim=1, eps=1e-5)
    assert relative(unit, want.detach()) < 1e-6
    assert relative(inverse, 1 / rows.detach().norm(dim=1).clamp_min(1e-5)) < 1e-6
    d_unit = torch.randn(stop - start, width, device=DEVICE)
    scale = torch.tensor(0.25, device=DEVICE)
    expected = torch.autograd.grad(want, rows, 0.25 * d_unit.double())[0]
    for out in (torch.empty_like(d_unit), d_unit):
        engine.normalize_rows_backward(d_unit, source, start, inverse, out, scale, index)
        # Clamped rows have large gradients: compared by themselves.
        large = expected.norm(dim=1) > 100 * math.sqrt(width)
        for chosen in (large, ~large):
            if width > 1 or not torch.equal(chosen, ~large):
                assert relative(out[chosen], expected[chosen]) < 2e-6
    if width == 1:
        # r (g - <g, u> u) cancels: zero but for rounding.
        assert (out[~large].abs() < 1e-4).all()


def test_labels_are_narrowed_exactly() -> None:
    """Some differ in their upper half only, some are next to the limit."""
    first = torch.tensor([5, -1, 2**30 - 1, 2**30, 2**40, 2**40 + 2**33, 5 + 2**32, 0, -9])
    second = torch.tensor([2**40, 5, 2**62, 2**30 + 6, 2**62, 2**30, -1, 5 + 2**32])
    # Many of one residue: they meet in the table, across blocks too.
    many = 2**30 + torch.arange(150) * 2**31
    first, second = torch.cat([first.repeat(30), many]).to(DEVICE), torch.cat([second, many])
    second = second.to(DEVICE)
    engine = TritonEngine(make_call("uss", torch.zeros(1, 1, device=DEVICE)))
    rows, columns = engine.prepare_labels(first, second)
    assert rows.dtype == columns.dtype == torch.int32
    wide, narrow = torch.cat([first, second]), torch.cat([rows, columns])
    assert torch.equal(narrow == -1, wide < 0)
    kept = wide >= 0
    wide, narrow = wide[kept], narrow[kept]
    assert torch.equal(wide[:, None] == wide[None], narrow[:, None] == narrow[None])


def test_classes_without_a_target_here_match_no_column() -> None:
    engine = TritonEngine(make_call("uss", torch.zeros(3, 1, device=DEVICE)))
    rows, columns = engine.prepare_labels(torch.tensor([1, -1, -2], device=DEVICE), None)
    assert columns.tolist() == [0, 1, 2]
    assert rows.tolist() == [1, -1, 3]


@triton.jit
def _blocks_kernel(out, first, second, TRIANGLE: tl.constexpr):
    program = tl.program_id(0)
    if TRIANGLE:
        row, column = triangle_block(program, first)
    else:
        row, column = grouped_block(program, first, second, 3)
    tl.store(out + 2 * program, row)
    tl.store(out + 2 * program + 1, column)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_programs_cover_every_block_once(count: int) -> None:
    for triangle, columns in ((True, count), (False, 5)):
        blocks = [(i, j) for i in range(count) for j in range(i if triangle else 0, columns)]
        out = torch.full((len(blocks), 2), -1, dtype=torch.int32, device=DEVICE)
        _blocks_kernel[(len(blocks),)](out, count, columns, TRIANGLE=triangle)
        assert sorted(map(tuple, out.tolist())) == blocks


def test_unavailable_returns_the_reason() -> None:
    assert "float32" in str(backend.unavailable(DEVICE, torch.float64))
    assert backend.unavailable("meta", torch.float32) is not None
    if launch.INTERPRETED:
        assert backend.unavailable("cuda", torch.float32) is not None
    else:
        assert "TRITON_INTERPRET" in str(backend.unavailable("cpu", torch.float32))
