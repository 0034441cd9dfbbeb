"""Triton's steps between tiles, each in one launch, against the operators that they replace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import Case, Problem, build
from support.helpers import TARGETS, Target
from support.row_optimizers import OPTIONS, SAMPLED
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor, nn

from unitsface_kernels.backends.streaming import Call, ForwardCache, Reductions, RowStep
from unitsface_kernels.functional.call import CallTensors
from unitsface_kernels.losses import REGISTRY

TRITON = [target for target in TARGETS if target.backend == "triton"]
if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from unitsface_kernels import passes  # noqa: E402
from unitsface_kernels.backends.streaming import make_call  # noqa: E402
from unitsface_kernels.backends.triton import draws  # noqa: E402
from unitsface_kernels.backends.triton.engine import TritonEngine  # noqa: E402

each_target = pytest.mark.parametrize("target", TRITON, ids=str)
SOFTMAX = REGISTRY["margin_softmax"]
SIZES = {"rows": 33, "columns": 150, "dim": 64}
#: More than one block of the programs that read all rows.
MANY = 2500


def _call(target: Target, loss: str = "margin_softmax", reduction: str = "mean", **sizes) -> Call:
    spec = REGISTRY[loss]
    p = build(Case("", labels="ignored", **(SIZES | sizes)), spec, device=target.device)
    return _of(p, reduction)


def _of(p: Problem, reduction: str = "mean") -> Call:
    spec = p.spec
    config = passes.CallConfig(
        spec,
        spec.pack(spec.defaults()),
        reduction,
        "triton",
        p.rows.dtype,
        self_offset=0 if p.columns is None else None,
        need_rows=True,
        need_columns=True,
    )
    tensors = CallTensors(p.rows, p.labels, p.columns)
    return make_call(config, tensors, ForwardCache())


def _numbers(call: Call, *shape: int) -> Tensor:
    return torch.randn(shape, device=call.rows.device)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("rows", [1, 33, MANY])
@each_target
def test_losses_are_reduced(target: Target, rows: int, reduction: str) -> None:
    call = _call(target, reduction=reduction, rows=rows, dim=4)
    losses, engine = _numbers(call, rows), TritonEngine(call)
    wanted = Reductions.reduced(engine, replace(call, cache=None), losses)
    check_same("loss", engine.reduced(call, losses), wanted, SAME_LOSS)
    assert call.cache is not None
    if reduction == "mean":
        assert call.cache.num_valid_rows == (call.row_labels != -1).sum().clamp(min=1)
        # The number is known from now on.
        check_same("again", engine.reduced(call, losses), wanted, SAME_LOSS)
        factor = TritonEngine(replace(call, cache=None)).mean_factor(replace(call, cache=None))
        check_same("factor", factor, 1.0 / call.cache.num_valid_rows, SAME_LOSS)


@each_target
def test_a_mean_over_no_row_is_zero(target: Target) -> None:
    call = _call(target)
    call.row_labels.fill_(-1)
    losses = torch.zeros(33, device=call.rows.device)
    assert TritonEngine(call).reduced(call, losses) == 0.0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("needed", [False, True])
@each_target
def test_totals_are_finished(target: Target, needed: bool, scaled: bool) -> None:
    call = _call(target, "uss", rows=MANY, columns=0, dim=4)
    call = replace(call, threshold=torch.tensor([2.0], device=call.rows.device))
    engine = TritonEngine(call)
    parts = _numbers(call, 2, 1100)
    norms = _numbers(call, MANY).abs()
    scale = torch.tensor(0.25, device=norms.device) if scaled else None

    def check(call: Call, norms: Tensor) -> Tensor:
        arguments = call, norms, parts[0], parts[1] if needed else None, scale
        found, wanted = (
            engine.finish_totals(*arguments),
            Reductions.finish_totals(engine, *arguments),
        )
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert (found[1] is None) == (wanted[1] is None) == (not needed)
        if needed:
            check_same("threshold", found[1], wanted[1], SAME_GRADIENT)
        return found[0]

    ignored = call.row_labels == -1
    assert bool(ignored.any())
    norms[ignored] = torch.nan
    assert bool(check(call, norms).isfinite())
    assert bool(check(replace(call, threshold=call.threshold * torch.inf), norms).isnan())
    norms[(~ignored).nonzero()[-1]] = torch.nan
    assert bool(check(call, norms).isnan())


@each_target
def test_factors_of_rows(target: Target) -> None:
    call = _call(target)
    state, weights = _numbers(call, 3, 33), _numbers(call, 33)
    state[:2, call.row_labels == -1] = torch.nan
    found = TritonEngine(call).row_factors(call, state, weights)
    wanted = Reductions.row_factors(None, call, state, weights)
    for name, got, want in zip(found._fields, found, wanted, strict=True):
        check_same(name, got, want, SAME_GRADIENT)
        assert got.data_ptr() % 16 == 0


@pytest.mark.parametrize("size", [5, 900, 10**12])
@pytest.mark.parametrize("count", [1, 7, MANY])
@each_target
def test_places_are_distinct(target: Target, count: int, size: int) -> None:
    """With and without places that are none, repeated ones included."""
    places = torch.randint(0, size + 1, (count,)).sort().values.to(target.device)
    wanted = places.unique()
    wanted = wanted[wanted < size]
    found = draws.distinct(places, size)
    assert torch.equal(found[: len(wanted)], wanted)
    assert bool((found[len(wanted) :] == size).all())


@pytest.mark.parametrize("count", [1, 2, 100, 1024])
@each_target
def test_positions_of_labels(target: Target, count: int) -> None:
    index = torch.randperm(5000)[:count].sort().values.to(target.device)
    drawn = index[torch.randint(0, count, (300,), device=target.device)]
    labels = torch.cat([drawn, torch.tensor([-1, -2, 0, 4999], device=target.device)])
    wanted = torch.where(labels < 0, labels, torch.searchsorted(index, labels))
    assert torch.equal(draws.positions(index, labels), wanted)


class _Sink:
    """The step of an optimizer, made by the kernels or here."""

    def __init__(self, p: nn.Parameter, name: str, index: Tensor | None, factor: Tensor) -> None:
        base, options = OPTIONS[name]
        self.update = SAMPLED[base]([p], **options).begin_row_update(p)
        self.index, self.factor = index, factor

    def __call__(self, rows: slice, gradient: Tensor) -> None:
        self.update(rows, gradient, self.index, self.factor)

    @property
    def step(self) -> RowStep:
        update = self.update
        return RowStep(
            update.weight, update.states, update.rule.code, vars(update.rule), self.factor
        )


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dim", [37, 64])
@pytest.mark.parametrize("name", OPTIONS)
@each_target
def test_steps_of_an_optimizer(
    target: Target, name: str, dim: int, sampled: bool, raw: bool
) -> None:
    """In the kernel of the normalization's gradient as after it; clamped norms included."""
    call = _call(target, dim=dim)
    assert call.columns is not None
    call.columns[7] = 1e-7
    index = torch.tensor([3, 7, 20, 21, 140], device=target.device) if sampled else None
    part = slice(1, 4) if sampled else slice(5, 90)
    factor, scale = torch.tensor([0.5, 2.0], device=target.device)
    found = []
    for in_kernel in (False, True):
        p = nn.Parameter(call.columns.clone())
        sink = _Sink(p, name, index, factor)
        for state in sink.update.states:
            state.copy_(torch.linspace(0.1, 0.2, state.numel()).view_as(state))
        own = replace(call, columns=p.detach(), column_index=index, sink=sink)
        engine = TritonEngine(own)
        _, norms = engine.normalize_rows(own.columns, part.start, part.stop, index)
        d_unit = torch.linspace(-1.0, 1.0, len(norms) * dim, device=target.device).view(-1, dim)
        before = p._version
        if in_kernel:
            assert engine.update_columns(own, part, d_unit, norms, scale, raw)
        else:
            engine.normalize_rows_backward(
                d_unit, own.columns, part.start, norms, d_unit, scale, index, raw
            )
            sink(part, d_unit)
        assert p._version > before
        assert not torch.equal(p, call.columns)
        found.append([p.detach(), *sink.update.states])
    for tensor, want in zip(found[1], found[0], strict=True):
        check_same(name, tensor, want, SAME_GRADIENT)


@each_target
def test_a_small_copy_of_the_columns_is_kept(target: Target) -> None:
    """From the forward to the backward pass, as unit rows are."""
    call = _call(target, dim=40)
    first, second = TritonEngine(call, gradients=False), TritonEngine(call)
    parts = [slice(0, 64), slice(64, 150)]
    for engine in (first, second):
        for part in parts:
            columns = engine.tile_columns(call.columns, part.start, part.stop)
            wanted, norms = engine.normalize_rows(call.columns, part.start, part.stop)
            assert torch.equal(columns.matrix, wanted)
            assert torch.equal(columns.inverse_norms, norms)
    assert first.unit_rows(call)[0] is second.unit_rows(call)[0]
    assert call.cache is not None
    kept, _ = call.cache.unit_columns
    assert first.tile_columns(call.columns, 0, 64).matrix.data_ptr() == kept.data_ptr()
    large = _call(target, columns=2000, dim=40)
    TritonEngine(large).tile_columns(large.columns, 0, 64)
    assert large.cache is not None
    assert large.cache.unit_columns is None
