"""Debug mode, ``UNITSFACE_CHECK=1``: the first operand or tile that is not finite is named."""

from __future__ import annotations

import re

import pytest
import torch
from support.cases import problem
from support.helpers import FUSED, Target, patched_blocks

from unitsface_kernels import fused_clip_loss, fused_elasticface_loss, passes
from unitsface_kernels.backends.native.cpu_engine import CpuEngine
from unitsface_kernels.losses import REGISTRY

BLOCK = 8
ROWS = 20
#: Losses of every driver, and the number of columns; None: the batch itself.
DRIVERS = {
    "uss": None,
    "sphereface2": 17,
    "margin_softmax": 17,
    "pair_softmax": None,
    "circle": None,
    "npt": 17,
}
targets = pytest.mark.parametrize("target", FUSED, ids=str)
losses = pytest.mark.parametrize("name", DRIVERS)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_blocks(monkeypatch, (BLOCK, BLOCK))
    monkeypatch.setenv("UNITSFACE_CHECK", "1")


def _problem(name: str, target: Target, **fields):
    fields = {"rows": ROWS, "columns": DRIVERS[name], **fields}
    return problem(REGISTRY[name], device=target.device, **fields)


@losses
@targets
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_are_named(target: Target, name: str, bad: float) -> None:
    p = _problem(name, target)
    p.rows[5, 3] = p.rows[9, 0] = bad
    norm = re.escape(f"(norm {bad:g})")
    match = f"loss {name}, stage operands: features are not finite in rows 5 {norm}, 9 {norm}$"
    with pytest.raises(FloatingPointError, match=match):
        p.loss(target.backend)


@targets
def test_other_operands_are_named(target: Target) -> None:
    p = _problem("margin_softmax", target)
    p.columns[3:11, 0] = torch.nan
    listed = ", ".join(rf"{row} \(norm nan\)" for row in (3, 4, 5, 6))
    with pytest.raises(FloatingPointError, match=f"class weights .* rows {listed} and 4 more$"):
        p.loss(target.backend)
    p = _problem("uss", target, columns=17, labels="columns ignored")
    p.columns[2] = torch.nan
    p.column_labels[2] = 1
    with pytest.raises(FloatingPointError, match="operands: memory are not finite in rows 2 "):
        p.loss(target.backend)
    p = _problem("uss", target)
    with pytest.raises(FloatingPointError, match=r"thresholds are not finite in entries 0 \(nan\)"):
        p.loss(target.backend, b=torch.tensor(torch.nan, device=target.device))
    margin = torch.full((ROWS,), 0.5, device=target.device)
    margin[2] = torch.inf
    p = _problem("margin_softmax", target)
    assert p.columns is not None
    with pytest.raises(FloatingPointError, match=r"values of margin .* in entries 2 \(inf\)$"):
        fused_elasticface_loss(p.rows, p.columns, p.labels, margin, backend=target.backend)
    a, b = (torch.randn(5, 8, device=target.device) for _ in range(2))
    b[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"features of the second tower .* in rows 3 "):
        fused_clip_loss(a, b, 10.0, backend=target.backend)


@targets
@pytest.mark.parametrize("name", ["margin_softmax", "npt", "pair_softmax"])
def test_upstream_gradients_are_named(target: Target, name: str) -> None:
    p = _problem(name, target, reduction="none")
    loss = p.loss(target.backend, **p.leaves())
    row = int((p.labels != -1).nonzero()[1])
    upstream = torch.ones_like(loss)
    upstream[row] = torch.inf
    match = rf"upstream gradients are not finite in entries {row} \(inf\)"
    with pytest.raises(FloatingPointError, match=match):
        loss.backward(upstream)


@losses
@targets
def test_ignored_rows_may_be_anything(
    target: Target, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = _problem(name, target, labels="ignored")
    p.rows[p.labels == -1] = torch.nan
    assert bool((p.labels == -1).any())
    loss, gradients = p.evaluate(target.backend)
    monkeypatch.delenv("UNITSFACE_CHECK")
    want, wanted = p.evaluate(target.backend)
    assert torch.equal(loss, want)
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)


@losses
@targets
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_results_are_the_same(
    target: Target, name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = _problem(name, target, reduction=reduction)
    found = p.evaluate(target.backend)
    monkeypatch.delenv("UNITSFACE_CHECK")
    want = p.evaluate(target.backend)
    assert torch.equal(found[0], want[0])
    assert all(torch.equal(found[1][key], want[1][key]) for key in want[1])


#: Loss, method, which tile is spoilt, the place in its result, and the error.
FAULTS = [
    (
        "sphereface2",
        "sum_tile",
        4,
        (2, 5),
        "stage gradient: gradient is nan in row 10, column 13; rows 8:16, columns 8:16",
    ),
    (
        "uss",
        "sum_tile",
        1,
        (2, 5),
        "stage gradient: gradient is nan in row 2, column 13; rows 0:8, columns 8:16",
    ),
    (
        "uss",
        "sum_tile",
        4,
        "a_loss",
        "stage loss: loss is nan in row 11; rows 8:16, columns 16:20",
    ),
    (
        "margin_softmax",
        "logsumexp_tile",
        3,
        "total",
        "stage statistics: total is nan in row 3; rows 0:8, columns 8:16",
    ),
    (
        "margin_softmax",
        "logsumexp_gradient_tile",
        5,
        (1, 2),
        "stage gradient: gradient is nan in row 17, column 10; rows 16:20, columns 8:16",
    ),
    (
        "pair_softmax",
        "pair_negatives_tile",
        4,
        "total",
        "stage statistics: total is nan in row 11; rows 8:16, columns 16:20",
    ),
    (
        "pair_softmax",
        "pair_gradient_tile",
        4,
        (1, 2),
        "stage gradient: gradient is nan in row 9, column 18; rows 8:16, columns 16:20",
    ),
    (
        "circle",
        "pair_sums_tile",
        4,
        "positive_total",
        "stage statistics: positive total is nan in row 11; rows 8:16, columns 16:20",
    ),
    (
        "circle",
        "pair_gradient_tile",
        4,
        (1, 2),
        "stage gradient: gradient is nan in row 9, column 18; rows 8:16, columns 16:20",
    ),
    (
        "npt",
        "nearest_tile",
        7,
        "best",
        "stage search: best is nan in row 11; rows 8:16, columns 16:17",
    ),
]


@targets
@pytest.mark.parametrize(("name", "method", "number", "place", "text"), FAULTS)
def test_faults_of_kernels_are_named(
    target: Target, name: str, method: str, number: int, place, text: str, monkeypatch
) -> None:
    """A NaN in one place of what a tile, and every later one, writes."""
    p = _problem(name, target)
    p.labels = p.labels.clamp(min=0)
    made = []

    def spoilt(backend, call, *arguments):
        engine = original(backend, call, *arguments)
        inner = engine._engine
        work, seen = getattr(inner, method), []

        def faulty(tile, *rows):
            result = work(tile, *rows)
            seen.append(tile)
            if len(seen) > number:
                if isinstance(place, tuple):
                    result[place] = torch.nan
                else:
                    # A total has no rows: the error takes its row from the same tile row by row.
                    row = 0 if getattr(tile, "total", False) else 3
                    getattr(rows[0] if rows else tile, place)[row] = torch.nan
            return result

        monkeypatch.setattr(inner, method, faulty)
        made.append(engine)
        return engine

    original = passes.make_engine
    monkeypatch.setattr(passes, "make_engine", spoilt)
    with pytest.raises(FloatingPointError) as caught:
        p.evaluate(target.backend)
    assert made
    largest = float(caught.value.args[0].rpartition(" ")[2])
    message = f"loss {name}, {text}, largest norm "
    assert str(caught.value).startswith(message)
    norms = p.rows.norm(dim=1)
    norms = norms if p.columns is None else torch.cat([norms, p.columns.norm(dim=1)])
    assert torch.isclose(norms, torch.tensor(largest, device=norms.device), rtol=1e-5).any()


def test_a_fault_of_the_normalization_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize = CpuEngine.normalize_rows

    def faulty(self, source, start, stop, index=None, reuse=False):
        unit, norms = normalize(self, source, start, stop, index, reuse)
        if reuse and start == 8:
            unit[2, 1] = torch.nan
        return unit, norms

    monkeypatch.setattr(CpuEngine, "normalize_rows", faulty)
    match = "loss npt, stage normalization: not finite in column 10; columns 8:16, largest norm "
    with pytest.raises(FloatingPointError, match=match):
        _problem("npt", Target("native", "cpu")).loss("native")


@pytest.mark.parametrize("value", [None, "0", ""])
def test_nothing_is_wrapped_without_the_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNITSFACE_CHECK")
    if value is not None:
        monkeypatch.setenv("UNITSFACE_CHECK", value)
    engines, original = [], passes.make_engine

    def watched(*arguments):
        engines.append(original(*arguments))
        return engines[-1]

    monkeypatch.setattr(passes, "make_engine", watched)
    p = _problem("margin_softmax", Target("native", "cpu"))
    p.evaluate("native")
    assert [type(engine) for engine in engines] == [CpuEngine, CpuEngine]
