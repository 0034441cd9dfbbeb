"""NaN and infinity reach the loss: by every place, in every dtype, whatever stands between.

The rule, from docs/math.md: the loss of a row is NaN if the row itself, a column that it is
compared with, or a threshold of the call is not finite. An ignored row contributes nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import Case as Conditions
from support.cases import build
from support.grid import calls, extended_if
from support.helpers import TARGETS, Target, patched_blocks
from support.ranks import run_ranks
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels.losses import LossSpec

# Quiet and signaling NaN of both signs, with payloads at either end, and infinities. A half
# precision NaN leaves the low bits of a widened one empty.
BITS = {
    torch.float32: (0x7FC00000, -0x400000, 0x7FC00001, -0x3FFF01, 0x7F800001, 0x7FC02000),
    torch.bfloat16: (0x7FC0, -0x40, 0x7F81, -1),
    torch.float16: (0x7E00, -0x200, 0x7C01, -1),
    torch.float64: (0x7FF8000000000000, -0x8000000000000, 0x7FF0000000000001),
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CONDITIONS = {
    "batch": Conditions("", rows=9, labels="ignored"),
    "columns": Conditions("", rows=9, columns=6, labels="ignored"),
    "one-identity": Conditions("", labels="one"),
    "one-identity-memory": Conditions("", labels="one", columns=5, topology="pair"),
    "no-positives": Conditions("", labels="distinct", topology="pair"),
    "no-positives-memory": Conditions("", labels="distinct", columns=5, topology="pair"),
    "lone-row": Conditions("", rows=1, topology="pair"),
    "single-column": Conditions("", columns=1, topology="class"),
    "ignored-memory": Conditions("", columns=5, labels="columns ignored", topology="pair"),
    "empty-memory": Conditions("", columns=0, topology="pair"),
    "clamped": Conditions("", rows=9, columns=8, features="axes"),
    "filtered": Conditions("", rows=9, columns=6, values={"lower": 0.999, "upper": 0.9999}),
    "subset": Conditions("", columns=12, subset=True, topology="class"),
}
PLACES = ("rows", "columns", "b")


def _bad_values(dtype: torch.dtype) -> list[Tensor]:
    integer = INTEGERS[dtype.itemsize]
    found = [torch.tensor(bits, dtype=integer).view(dtype) for bits in BITS[dtype]]
    assert all(bool(t.isnan()) for t in found)
    return [*found, torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)]


def _masks(p) -> tuple[Tensor, Tensor]:
    if p.spec.topology == "pair":
        return p.pairs()
    count = len(p.columns if p.index is None else p.index)
    positive = p.labels[:, None] == torch.arange(count, device=p.labels.device)
    return positive, (p.labels != -1)[:, None] & ~positive


def _broken(p, place: str, bad: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """The tensor of a place with a bad value in it, and the rows whose loss it has to reach."""
    positive, negative = _masks(p)
    labeled = p.labels != -1
    compared = negative if p.spec.positive is None and not p.spec.triplet else positive | negative
    if place == "rows":
        row = int(labeled.nonzero()[0])
        rows = p.rows.clone()
        rows[row, 3] = bad
        reached = torch.arange(len(rows), device=rows.device) == row
        if p.columns is None:
            reached |= compared[:, row] & p.valid_rows()
        return {"rows": rows}, reached
    if place == "columns" and p.columns is not None and len(p.columns):
        column = len(p.columns) // 2
        columns = p.columns.clone()
        columns[column, 3] = bad
        places = torch.arange(len(columns), device=columns.device)
        hit = (places if p.index is None else p.index.long()) == column
        return {"columns": columns}, (compared & hit).any(dim=1) & p.valid_rows()
    if place == "b" and isinstance(p.b, Tensor):
        b = p.b.clone()
        if p.spec.threshold == "scalar":
            b.fill_(bad)
            return {"b": b}, labeled
        labels = p.column_labels if p.columns is not None else p.labels
        if p.spec.topology == "class":
            which = len(b) // 2 if p.index is None else int(p.index[0])
        elif bool((labels >= 0).any()):
            which = int(labels[labels >= 0][-1])
        else:
            which = 0
            labeled = torch.zeros_like(labeled)
        b[which] = bad
        return {"b": b}, labeled
    return None


def _grid() -> list:
    return [
        pytest.param(
            *(*call.values, dtype, place),
            id=f"{call.id}-{dtype}-{place}",
            # Half precision is converted before the reference begins.
            marks=[
                *call.marks,
                *extended_if(call.values[0].backend == "reference" and dtype.itemsize == 2),
            ],
        )
        for call in calls(TARGETS)
        for dtype in BITS
        for place in PLACES
        if call.values[0].runs(dtype)
        and not (place == "b" and call.values[1].threshold == "none")
        and not (call.values[0].interpreted and dtype == torch.bfloat16)
    ]


@pytest.mark.parametrize(("target", "spec", "dtype", "place"), _grid())
def test_what_is_not_finite_reaches_the_loss(
    target: Target, spec: LossSpec, dtype: torch.dtype, place: str
) -> None:
    cases = {name: case for name, case in CONDITIONS.items() if case.applies(spec)}
    reductions = ("mean", "sum")
    if target.interpreted:
        # A total has its own kernel where it is the sum of pairs, else it is the sum of rows.
        reductions = ("sum",) if spec.reduction == "sum" else ()
    for number, (name, case) in enumerate(cases.items()):
        p = build(case, spec, dtype=dtype, device=target.device)
        kind = p.b.dtype if place == "b" and isinstance(p.b, Tensor) else dtype
        values = _bad_values(kind)
        for bad in values[number % 4 :: len(values)] if target.interpreted else values:
            found = _broken(p, place, bad.to(target.device))
            if found is None:
                continue
            changes, reached = found
            where = f"{name}, {bad.item()}"
            rows = p.loss(target.backend, reduction="none", **changes)
            assert torch.equal(rows.isnan(), reached), where
            for reduction in reductions:
                loss = p.loss(target.backend, reduction=reduction, **changes)
                assert bool(loss.isnan()) == bool(reached.any()), where


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize(("target", "spec"), calls(TARGETS))
def test_gradients_of_long_rows(target: Target, spec: LossSpec, columns: int | None) -> None:
    """Norms whose squares overflow: the same loss, and gradients smaller by the same factor."""
    p = build(Conditions("", rows=9, columns=columns), spec, device=target.device)
    want, gradients = p.evaluate(target.backend)
    for exponent in (63, 70, 100):
        p.rows = p.rows * 2.0**exponent
        if p.columns is not None:
            p.columns = p.columns * 2.0**exponent
        loss, found = p.evaluate(target.backend)
        torch.testing.assert_close(loss, want)
        for name, gradient in found.items():
            factor = 2.0**exponent if name in ("rows", "columns") else 1.0
            torch.testing.assert_close(gradient * factor, gradients[name], rtol=1e-4, atol=1e-5)
        p = build(Conditions("", rows=9, columns=columns), spec, device=target.device)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("target", "spec"), calls(TARGETS))
def test_an_ignored_row_contributes_nothing(
    target: Target, spec: LossSpec, columns: int | None, reduction: str
) -> None:
    case = Conditions("", rows=9, columns=columns, labels="ignored", reduction=reduction)
    p = build(case, spec, device=target.device)
    want, gradients = p.evaluate(target.backend)
    p.rows[p.labels == -1] = torch.nan
    loss, found = p.evaluate(target.backend)
    torch.testing.assert_close(loss, want)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], msg=name)
    assert not bool(found["rows"][p.labels == -1].any())


SKIPPING = {"uss", "pair_bce", "margin_softmax", "uce", "class_bce", "sphereface2"}


def _skipping_grid() -> list:
    return [
        pytest.param(
            *call.values,
            columns,
            tolerance,
            id=f"{call.id}-{columns}-{tolerance:g}",
            marks=call.marks,
        )
        for call in calls(TARGETS)
        for columns in (None, 23)
        for tolerance in (0.0, 1e9)
        if tolerance == 0.0 or call.values[1].name in SKIPPING
    ]


@pytest.mark.parametrize(("target", "spec", "columns", "tolerance"), _skipping_grid())
def test_it_reaches_the_gradients(
    target: Target,
    spec: LossSpec,
    columns: int | None,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or a gradient scaler would take the step: from every tile, and where tiles are left out."""
    patched_blocks(monkeypatch, (8, 8))
    p = build(Conditions("", rows=20, columns=columns), spec, device=target.device)
    for place in ("rows",) if target.interpreted else PLACES:
        # Terms saturate for an infinite threshold: their derivatives are finite.
        for bad in (math.nan,) if place == "b" else (math.nan, math.inf):
            found = _broken(p, place, torch.tensor(bad))
            if found is None:
                continue
            changes, reached = found
            leaves = {name: t.requires_grad_() for name, t in (p.leaves() | changes).items()}
            extra = {"skip_tolerance": tolerance} if tolerance else {}
            p.values, values = p.values | extra, p.values
            loss = p.loss(target.backend, **leaves)
            p.values = values
            assert bool(loss.isnan()) or not bool(reached.any())
            loss.backward()
            if bool(reached.any()):
                finite = [bool(t.grad.isfinite().all()) for t in leaves.values()]
                assert not all(finite), f"{place}, {bad}"


def _on_ranks(rank: int, bad: float) -> list[bool]:
    """Whether each loss is NaN: from features of the second rank, and from its class weights."""
    torch.manual_seed(rank)
    feats, labels = torch.randn(6, 8), torch.arange(6) % 4
    group = torch.distributed.group.WORLD
    broken = feats.clone()
    if rank == 1:
        broken[2, 3] = bad
    found = []
    for name in ("fused_pair_softmax_loss", "fused_pair_logsumexp", "fused_uss_loss"):
        b = (5.0,) if name == "fused_uss_loss" else ()
        for given in (feats, broken):
            loss = getattr(uk, name)(given, labels + 4 * rank * (b == ()), *b, group=group)
            found.append(bool(loss.isnan()))
    for name in ("cosface", "arcface", "uce", "class_bce", "sphereface2", "npt", "epl", "vpl"):
        head = uk.PartialFC(name, 8, 5)
        found += [bool(head(given, labels).isnan()) for given in (feats, broken)]
        if rank == 1:
            with torch.no_grad():
                head.weight[1, 3] = bad
        found.append(not bool(head(feats, labels).isnan()))
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_reaches_the_loss_of_every_rank(bad: float) -> None:
    first, second = run_ranks(2, _on_ranks, bad)
    pairs, shards = [False, True] * 3, [False, True, False] * 8
    assert first == second == pairs + shards
