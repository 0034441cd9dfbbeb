"""The search for nearest wrong columns, tile by tile, and what a loss over it means.

Operands are small multiples of a power of two, so that every cosine is exact in any order of
summation: the search has one right answer, ties included.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.cases import build, problem
from support.grid import parity_cases
from support.helpers import FUSED, TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels import fused_npt_loss, ops
from unitsface_kernels.backends import reference, streaming
from unitsface_kernels.backends.streaming import CallConfig
from unitsface_kernels.backends.streaming.nearest import search
from unitsface_kernels.losses import REGISTRY

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_fused = pytest.mark.parametrize("target", FUSED, ids=str)
SPEC = REGISTRY["npt"]
# The padded depth of Triton's unit rows.
DEPTH = 64


def _engine(target: Target, rows: Tensor, columns: Tensor) -> streaming.Engine:
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    static = (SPEC, SPEC.pack(SPEC.defaults()), "sum", target.backend, rows.dtype)
    call = streaming.Call(
        *static,
        need_rows=True,
        need_columns=True,
        rows=rows,
        row_labels=labels,
        columns=columns,
    )
    if target.backend == "triton":
        from unitsface_kernels.backends.triton.engine import TritonEngine

        return TritonEngine(call, gradients=False)
    from unitsface_kernels.backends import native

    return native.make_engine(call, "forward", False, lambda engine: None)


def _features(count: int, levels: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1 / levels, a power of two; with a small one most cosines are equal."""
    values = torch.randint(-levels, levels + 1, (count, DEPTH), generator=generator) / levels
    if levels < 4:
        values[:, 4:] = 0.0
    return values


def _expected(cosine: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """By a stable sort of the whole matrix; ``targets`` are positions in it."""
    count, columns = cosine.shape
    wrong = targets[:, None] != torch.arange(columns)
    cosine_of_wrong = cosine.masked_fill(~wrong, -torch.inf)
    order = torch.sort(cosine_of_wrong, dim=1, descending=True, stable=True)
    best, position = torch.full((count, k), -torch.inf), torch.full((count, k), -1)
    width = min(k, columns)
    best[:, :width] = order.values[:, :width]
    position[:, :width] = order.indices[:, :width].masked_fill(best[:, :width] == -torch.inf, -1)
    own = torch.zeros(count)
    for i in (targets >= 0).nonzero()[:, 0].tolist():
        own[i] = cosine[i, targets[i]]
    return best, position, own


def _found(
    target: Target, a: Tensor, b: Tensor, targets: Tensor, k: int, tiles: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, targets = a.to(target.device), b.to(target.device), targets.to(target.device)
    engine = _engine(target, a, b)
    best = torch.full((a.shape[0], k), -torch.inf, device=target.device)
    position = torch.full(best.shape, -1, dtype=torch.int32, device=target.device)
    own = torch.zeros(a.shape[0], device=target.device)
    for start, stop in itertools.pairwise(tiles):
        tile = streaming.ClassTile(a, b[start:stop], targets, start)
        engine.nearest_tile(tile, streaming.Nearest(best, position, own))
    return best.cpu(), position.cpu().long(), own.cpu()


@each_fused
@pytest.mark.parametrize("levels", [1, 128], ids=["ties", "distinct"])
@pytest.mark.parametrize(
    ("rows", "tiles", "k"),
    [
        *((1, [0, 1], k) for k in (1, 64)),
        *((3, [0, 1, 40], k) for k in (1, 2, 5, 64)),
        *((37, [0, 31, 32, 170], k) for k in (1, 2, 5)),
        pytest.param(9, [0, 31, 32, 100], 33, marks=pytest.mark.extended),
        (70, [0, 129, 300], 2),
    ],
    ids=str,
)
def test_nearest_tile(target: Target, rows: int, tiles: list[int], k: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(rows * k)
    a, b = _features(rows, levels, generator), _features(tiles[-1], levels, generator)
    # Zeros of either sign are equal.
    a[rows // 2] = -0.0
    targets = torch.randint(-2, tiles[-1], (rows,), generator=generator)
    want = _expected(a @ b.T, targets, k)
    for got, expected in zip(_found(target, a, b, targets, k, tiles), want, strict=True):
        assert torch.equal(got, expected)


@each_fused
def test_nan_comes_before_every_number(target: Target) -> None:
    """NaN in columns, rows and targets, and in more columns than are searched for."""
    generator = torch.Generator().manual_seed(5)
    a, b = _features(9, 128, generator), _features(100, 128, generator)
    b[torch.tensor([3, 40, 41, 99])] = torch.nan
    # What the processor makes of infinity times 0 is a NaN of negative sign.
    b[40] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    a[4, 2] = torch.nan
    targets = torch.tensor([3, -1, 99, 0, 7, -2, 40, 41, 50])
    for k in (1, 3, 64):
        best, position, own = _found(target, a, b, targets, k, [0, 33, 100])
        want_best, want_position, want_own = _expected(a @ b.T, targets, k)
        assert torch.equal(position, want_position)
        torch.testing.assert_close(best, want_best, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(own, want_own, rtol=0, atol=0, equal_nan=True)


@each_fused
@pytest.mark.parametrize("k", [1, 64])
def test_a_large_count_takes_several_launches(
    target: Target, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are bounded, not a second matrix."""
    if target.backend != "triton":
        pytest.skip("only Triton keeps candidates")
    from unitsface_kernels.backends.triton import nearest_tile

    launches = []
    run = nearest_tile.launch.run_tile

    def counting(*args, **options):
        launches.append(1)
        run(*args, **options)

    monkeypatch.setattr(nearest_tile.launch, "run_tile", counting)
    monkeypatch.setattr(nearest_tile, "CANDIDATE_BYTES", 5 * 64 * 8)
    generator = torch.Generator().manual_seed(5)
    a, b = _features(5, 2, generator), _features(160, 2, generator)
    targets = torch.arange(5) * 39
    got = _found(target, a, b, targets, k, [0, 160])
    for tensor, expected in zip(got, _expected(a @ b.T, targets, k), strict=True):
        assert torch.equal(tensor, expected)
    assert (len(launches) > 1) == (k == 64)


@each_fused
def test_search_of_sampled_columns(target: Target) -> None:
    """Positions refer to the sample; it streams tiles of the engine's own size."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(30, 16, generator=generator).to(target.device)
    columns = torch.randn(1500, 16, generator=generator).to(target.device)
    index = torch.randperm(1500, generator=generator)[:1300].to(target.device)
    labels = (torch.arange(30, device=target.device) * 40) - 1
    static = (SPEC, SPEC.pack(SPEC.defaults()), "sum", target.backend, rows.dtype)
    call = streaming.Call(
        *static, rows=rows, row_labels=labels, columns=columns, column_index=index
    )
    engine = _engine(target, rows, columns)
    best, position, own = search(call, engine, 4)
    cosine = reference.cosines(rows.double(), columns[index].double())
    wanted = cosine.masked_fill(labels[:, None] == torch.arange(1300, device=rows.device), -9.0)
    values, order = wanted.topk(4, dim=1)
    assert torch.equal(position.long(), order)
    check_same("best", best, values, SAME_LOSS)
    targets = cosine.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0.0)
    check_same("targets", own, targets, SAME_LOSS)


# --- the loss -------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("k", [1, 2, 3, 64])
def test_value_and_gradient_by_hand(target: Target, k: int) -> None:
    """Equal cosines: the first of two equal class weights takes the gradient, the other none."""
    feats = torch.tensor([[2.0, 2.0, 2.0, 2.0]], device=target.device, requires_grad=True)
    signs = [[1, -1, -1, 0], [-1, -1, -1, -1], [1, 0, 0, 0], [0, 4, 0, 0], [1, 1, 1, -1]]
    weight = torch.tensor(signs, dtype=torch.float32, device=target.device).requires_grad_()
    # Cosines: target -1, then 0.5, 0.5 and 0.5; the first weight's is negative.
    labels = torch.tensor([1], device=target.device)
    loss = fused_npt_loss(feats, weight, labels, margin=-2.0, k=k, backend=target.backend)
    negative = max(2 * (1 - 0.5 / math.sqrt(3)) - 2, 0.0)
    want = {1: 1.0, 2: 1.0, 3: 1.0, 64: (3 * 1.0 + negative) / 4}[k]
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    loss.backward()
    x, w = feats.detach()[0] / 4, torch.nn.functional.normalize(weight.detach(), dim=1)
    assert weight.grad is not None
    for j, taken in enumerate([False, True, True, k > 1, k > 2]):
        # The target's weight is opposite to the row: no direction changes that cosine.
        slope = 2.0 / min(k, 4) if taken and j != 1 else 0.0
        wanted = slope * (x - (x @ w[j]) * w[j]) / weight.detach()[j].norm()
        check_same(f"weight {j}", weight.grad[j], wanted, SAME_GRADIENT)


@each_target
def test_as_many_as_there_are(target: Target) -> None:
    p = problem(SPEC, target.device, rows=9, columns=6)
    p.values = {"k": 5}
    loss, gradients = p.evaluate(target.backend)
    p.values = {"k": 64}
    other_loss, other = p.evaluate(target.backend)
    check_same("loss", other_loss, loss, SAME_LOSS)
    for name, gradient in gradients.items():
        check_same(name, other[name], gradient, SAME_GRADIENT)


@each_target
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_in_another_shard(target: Target, reduction: str) -> None:
    """Without its target's cosine a row has neither loss nor gradient; the mean counts it."""
    p = problem(SPEC, target.device, rows=6, columns=9)
    p.labels[2], p.labels[4] = -2, -1
    leaves = p.leaves()
    params = SPEC.pack(SPEC.defaults())
    if target.backend == "reference":
        config = CallConfig(SPEC, params, reduction, "reference", p.rows.dtype)
        loss = reference.similarity_loss(config, leaves["rows"], p.labels, leaves["columns"])
    else:
        loss, *_ = ops.similarity_loss(
            *(leaves["rows"], p.labels, leaves["columns"], None, None, None, None),
            *(SPEC.name, list(params), reduction),
            *(target.backend, p.rows.dtype, 0.0, True, True, False),
        )
    here = torch.tensor([0, 1, 3, 5], device=target.device)
    alone = fused_npt_loss(
        p.rows[here], p.columns, p.labels[here], reduction="none", backend=target.backend
    )
    if reduction == "mean":
        check_same("loss", loss.detach(), alone.sum() / 5, SAME_LOSS)
        loss.backward()
    else:
        check_same("loss", loss.detach()[here], alone, SAME_LOSS)
        assert loss.detach()[torch.tensor([2, 4])].tolist() == [0.0, 0.0]
        loss.sum().backward()
    of_rows = leaves["rows"].grad
    assert of_rows is not None
    assert bool(of_rows[here].any(dim=1).all())
    assert not bool(of_rows[torch.tensor([2, 4])].any())


@each_target
def test_an_ignored_row_cannot_spoil_a_gradient(target: Target) -> None:
    """Its features may be anything, as may a column that no other row has found."""
    p = problem(SPEC, target.device, rows=6, columns=9)
    if target.backend == "reference":
        pytest.skip("autograd multiplies NaN by 0")
    p.labels[2] = -1
    p.rows[2] = torch.nan
    _, gradients = p.evaluate(target.backend)
    assert bool(gradients["columns"].isfinite().all())
    keep = torch.arange(6, device=target.device) != 2
    assert bool(gradients["rows"][keep].isfinite().all())
    assert bool(gradients["rows"][keep].any())


def test_hinges_of_the_grid_are_of_both_kinds() -> None:
    """Parity means little for a loss that is 0, or linear."""
    active = []
    for _, spec, values, case in parity_cases():
        if spec is SPEC and case.name in ("base", "columns"):
            p = build(case, spec, values)
            rows = p.loss("reference", reduction="none")
            assert bool(rows.any())
            cosine = reference.cosines(p.rows, p.columns)
            margin = {**spec.defaults(), **values}["margin"]
            gaps = 2 * (cosine - cosine.gather(1, p.labels[:, None])) + margin
            active.append(float((gaps > 0).float().mean()))
    assert any(0.2 < share < 0.95 for share in active)
