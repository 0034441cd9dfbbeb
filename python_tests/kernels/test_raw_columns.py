"""Triton's tiles multiply class weights as they are, where these have the dtype of the GEMMs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.cases import Case, Problem, build
from support.evaluation import check_against_reference
from support.grid import extended_if, representatives
from support.helpers import TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels import passes
from unitsface_kernels.backends.streaming import Call, ClassSums, Shards, logsumexp
from unitsface_kernels.functional.call import CallTensors
from unitsface_kernels.losses import REGISTRY, LossSpec

TRITON = [target for target in TARGETS if target.backend == "triton"]
if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from unitsface_kernels.backends.triton import workspace  # noqa: E402
from unitsface_kernels.backends.triton.engine import TritonEngine  # noqa: E402

each_target = pytest.mark.parametrize("target", TRITON, ids=str)
# Their tiles are class tiles; those of a sum loss take unit columns.
LOSSES = [
    spec for spec in REGISTRY.values() if spec.topology == "class" and spec.reduction != "sum"
]
FIRST = representatives(LOSSES)
each_loss = pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.name, marks=extended_if(s not in FIRST)) for s in LOSSES]
)
SOFTMAX = REGISTRY["margin_softmax"]
# Neither rows nor columns are a multiple of a block, and columns take several tiles.
SIZES = {"rows": 33, "columns": 150, "dim": 64}
CASES = [
    Case("plain", **SIZES),
    Case("wide", rows=9, columns=70, dim=192, labels="ignored", reduction="none"),
    Case("single", rows=5, columns=1, dim=64),
    Case("subset", **SIZES, subset=True),
    Case("padded", rows=9, columns=70, dim=72),
    Case("zeros", **SIZES, features="zeros"),
    Case("axes", rows=9, columns=12, dim=64, features="axes"),
    Case("short", **SIZES, features="short"),
    Case("frozen", **SIZES, column_gradient=False),
]
COPIED = {"subset", "padded"}
NORMS = [
    *((1e-4, torch.bfloat16), (1e30, torch.bfloat16)),
    *((1e20, torch.float32), (1e36, torch.float32)),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block of columns that the engine prepared was raw."""
    found: list[bool] = []
    prepare = TritonEngine.tile_columns

    def spied(self, *arguments):
        columns = prepare(self, *arguments)
        found.append(columns.raw)
        return columns

    monkeypatch.setattr(TritonEngine, "tile_columns", spied)
    return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *(case, dtype),
            id=f"{case.name}-{dtype}",
            marks=extended_if(dtype != torch.bfloat16 and case.name != "plain"),
        )
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
@each_loss
@each_target
def test_parity(
    target: Target, spec: LossSpec, case: Case, dtype: torch.dtype, taken: list[bool]
) -> None:
    if dtype == torch.float16 and case.features in ("short", "zeros"):
        pytest.skip("gradients of features of this length are beyond float16")
    check_against_reference(target, build(case, spec, None, dtype, target.device), dtype)
    assert set(taken) == {case.name not in COPIED and dtype != torch.float16}


@pytest.mark.parametrize("m2", [0.0, 0.5])
@each_target
def test_a_policy_that_is_not_linear(
    target: Target, m2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of the cosines before a policy that is not declared to have any."""
    from unitsface_kernels.backends.triton import losses

    case = Case("", **SIZES, values={"m2": m2})
    policy = replace(losses.policy_of(SOFTMAX), linear=False)
    monkeypatch.setitem(losses._known, "margin_softmax", policy)
    check_against_reference(target, build(case, SOFTMAX, device=target.device), torch.float32)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@each_loss
@each_target
def test_lengths(
    target: Target, spec: LossSpec, norm: tuple[float, torch.dtype], taken: list[bool]
) -> None:
    """Squares overflow, and gradients of the unit columns are nearly denormal."""
    case = Case("", rows=7, columns=9, dim=64, norm=norm[0], values={"scale": 16.0})
    p = build(case, spec, None, norm[1], target.device)
    loss, gradients = check_against_reference(target, p, norm[1])
    assert taken
    assert all(taken)
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_target
def test_what_is_not_finite_reaches_loss_and_gradient(
    target: Target, dtype: torch.dtype, bad: float, taken: list[bool]
) -> None:
    for spec in LOSSES:
        p = build(Case("", **SIZES, labels="ignored"), spec, None, dtype, target.device)
        p.columns[77, 3] = bad
        assert torch.equal(p.loss("triton", reduction="none").isnan(), p.labels != -1)
    assert all(taken)
    leaves = p.leaves()
    p.loss("triton", **leaves).backward()
    assert not all(bool(leaf.grad.isfinite().all()) for leaf in leaves.values())


def _evaluate_with_copy(p: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.Workspace, "multiplies", lambda self, columns: False)
        return p.evaluate("triton")


@pytest.mark.parametrize("tolerance", [0.0, pytest.param(1e-9, marks=pytest.mark.extended), 1e-3])
@each_target
def test_the_copy_gives_the_same(target: Target, tolerance: float) -> None:
    """With tiles left out of the gradient, whose targets are added apart."""
    p = build(Case("", rows=40, columns=600, dim=64), SOFTMAX, device=target.device)
    # The other half is at its class: light, but for the targets.
    p.rows[::2] = 4.0 * p.columns[p.labels[::2]] + 0.1 * p.rows[::2]
    p.values = {"scale": 64.0, "m3": 0.1} | ({"skip_tolerance": tolerance} if tolerance else {})
    loss, gradients = p.evaluate("triton")
    want, wanted = _evaluate_with_copy(p)
    check_same("loss", loss, want, SAME_LOSS)
    for name, gradient in gradients.items():
        check_same(name, gradient, wanted[name], SAME_GRADIENT)


@each_target
def test_norms_are_computed_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first pass, also of a retained graph; anew without a place to keep them."""
    made: list[int] = []
    write = TritonEngine._write_unit

    def spied(self, source, index, start, unit, inverse_norms, *labels):
        if unit is None:
            made.append(len(inverse_norms))
        write(self, source, index, start, unit, inverse_norms, *labels)

    monkeypatch.setattr(TritonEngine, "_write_unit", spied)
    monkeypatch.setattr(TritonEngine, "class_block", (40, 64))
    p = build(Case("", **SIZES), SOFTMAX, device=target.device)
    leaves = p.leaves()
    loss = p.loss("triton", **leaves)
    # Blocks of other sizes than in the first pass.
    monkeypatch.setattr(TritonEngine, "class_block", (40, 96))
    loss.backward(retain_graph=True)
    first = leaves["columns"].grad.clone()
    loss.backward()
    assert torch.equal(leaves["columns"].grad, 2.0 * first)
    assert made == [64, 64, 22]
    call = _call(p, target)
    result = passes.forward(call, gradients=False)
    passes.backward(call, result.state, torch.ones(len(p.rows), device=target.device))
    assert made == [64, 64, 22, *[96, 54] * 2]


def _call(p: Problem, target: Target, **changes) -> Call:
    tensors = CallTensors(p.rows, p.labels, p.columns)
    static = (SOFTMAX, SOFTMAX.pack(SOFTMAX.defaults() | p.values), "none", "triton", p.rows.dtype)
    needs = {"need_rows": True, "need_columns": True}
    return Call(*static, **needs, **{**tensors._asdict(), **changes})


class _Together(Shards):
    """Merges this shard's statistics with those of the other ones, which are known."""

    def __init__(self, others: list[tuple[Tensor, Tensor]]) -> None:
        object.__setattr__(self, "others", others)

    def log_of_sums(self, parts: Tensor, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        both = [(parts, target_cosine), *self.others]
        return (
            torch.stack([part for part, _ in both]).logsumexp(0),
            sum(cosine for _, cosine in both),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_target
def test_shards(target: Target, dtype: torch.dtype) -> None:
    """A part of the classes, most targets elsewhere: losses and gradients of the whole."""
    p = build(Case("", **SIZES, labels="ignored"), SOFTMAX, None, dtype, target.device)
    p.labels[1] = 149
    whole = passes.forward(_call(p, target), gradients=False)
    weights = torch.linspace(-1.0, 2.0, len(p.rows), device=target.device)
    d_rows, d_columns, *_ = passes.backward(_call(p, target), whole.state, weights)
    bounds = [(0, 64), (64, 150)]
    calls, parts = [], []
    for start, stop in bounds:
        inside = (p.labels >= start) & (p.labels < stop)
        labels = torch.where(inside, p.labels - start, torch.where(p.labels == -1, -1, -2))
        calls.append(_call(p, target, columns=p.columns[start:stop], row_labels=labels))
        engine = TritonEngine(calls[-1], gradients=False)
        unit, _ = engine.unit_rows(calls[-1])
        sums = logsumexp._statistics(calls[-1], engine, unit, None)
        parts.append((logsumexp._log_of_sums(sums.maximum, sums.total), sums.target_cosine))
    d_sum = torch.zeros_like(d_rows)
    # A gradient tile may round to the neighboring number.
    tolerance = SAME_GRADIENT if dtype == torch.float32 else 2**-9
    for number, (start, stop) in enumerate(bounds):
        call = replace(calls[number], shards=_Together([parts[1 - number]]))
        result = passes.forward(call, gradients=False)
        check_same("loss", result.loss, whole.loss, SAME_LOSS)
        check_same("state", result.state, whole.state, SAME_LOSS)
        d_some, d_part, *_ = passes.backward(call, result.state, weights)
        d_sum += d_some
        check_same("columns", d_part, d_columns[start:stop], tolerance)
    check_same("rows", d_sum, d_rows, tolerance)


@pytest.mark.parametrize("parts", [0, 1, 5])
@each_target
def test_rows_are_finished_as_by_torch(target: Target, parts: int) -> None:
    """Rows without negatives, without a target, ignored, and not finite included."""
    p = build(Case("", rows=40, columns=150, dim=64), SOFTMAX, device=target.device)
    p.values = {"m2": 0.3}
    p.labels[5:9], p.labels[9:12] = -1, -2
    maximum = 20.0 * torch.randn(parts, 40, device=target.device)
    total = 1.0 + 50.0 * torch.rand(parts, 40, device=target.device)
    cosine = torch.linspace(-1.0, 1.0, 40, device=target.device)
    maximum[: parts // 2, ::3], total[: parts // 2, ::3] = -torch.inf, 0.0
    maximum[:, 20], total[:, 20] = -torch.inf, 0.0
    maximum[:1, 30], cosine[31] = torch.nan, torch.nan
    call = _call(p, target)
    engine, sums = TritonEngine(call), ClassSums(maximum, total, cosine)

    def positive(cosine: Tensor) -> tuple[Tensor, Tensor]:
        x = cosine.double().requires_grad_()
        logits = call.spec.positive(x, None, call.params)
        return logits.detach().float(), torch.autograd.grad(logits.sum(), x)[0].float()

    found = engine.finish_rows(call, sums)
    wanted = logsumexp.finish_rows(call, sums, positive)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, equal_nan=True)
