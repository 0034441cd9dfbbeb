"""``skip_tolerance``: what is left out of gradients stays under the bound of docs/math.md."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.cases import problem
from support.given_variables import streams
from support.grid import extended_if
from support.helpers import FUSED, Target, patched_blocks
from support.tolerances import ROUNDED_ONCE, SAME_GRADIENT, SKIP_ROUNDING, check_same
from torch import Tensor
from torch.nn.functional import normalize

import unitsface_kernels
from unitsface_kernels import fused_uss_loss
from unitsface_kernels.backends.native.cpu_engine import CpuEngine
from unitsface_kernels.backends.streaming import RowSelection, filtering, logsumexp
from unitsface_kernels.backends.streaming import sum as sums
from unitsface_kernels.losses import REGISTRY, LossSpec

# Matmuls of selected rows read whole blocks of a workspace.
pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOLERANCE = 1e-3
SKIPPING = [
    spec
    for spec in REGISTRY.values()
    if spec.reduction == "sum" or (spec.reduction, spec.topology) == ("logsumexp", "class")
    if not streams(spec)
]
each_target = pytest.mark.parametrize("target", FUSED, ids=str)
BLOCKS = (8, 64)
ROWS, IDENTITIES, DIM = 40, 300, 256


def separated(seed: int, columns: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features (ROWS, DIM) near their class weights (columns, DIM), and labels.

    ``spread`` varies from row to row between 0 and its value. Classes from 200 on look like those
    from 0 on: the tile with these negatives is heavy, for the rows that are near enough, and the
    others are light.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, DIM, generator=generator)
    if spread > 0.0:
        weight[200:255] = weight[:55] + 0.5 * torch.randn(55, DIM, generator=generator)
    labels = torch.randint(0, columns // 5, (ROWS,), generator=generator)
    noise = torch.randn(ROWS, DIM, generator=generator) * torch.linspace(0, spread, ROWS)[:, None]
    return 3.0 * (weight[labels] + noise), weight, labels


def _gradients(loss, leaves: dict[str, Tensor], upstream: Tensor, tolerance: float):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    value = loss(**leaves, skip_tolerance=tolerance)
    value.backward(upstream)
    return value.detach(), {name: t.grad for name, t in leaves.items()}


def _check_bound(spec, params, rows, columns, exact, found, weights: Tensor) -> None:
    """The two inequalities of docs/math.md, with room for the rounding of both gradients."""
    limit = TOLERANCE * spec.slope_bound(params) * weights.abs().amax()
    error = (found["rows"] - exact["rows"]).norm(dim=1) * rows.norm(dim=1)
    scale = (exact["rows"].norm(dim=1) * rows.norm(dim=1)).amax()
    assert bool((error <= limit + SKIP_ROUNDING * scale).all())
    if "columns" in found:
        error = (found["columns"] - exact["columns"]).norm(dim=1) * columns.norm(dim=1)
        scale = (exact["columns"].norm(dim=1) * columns.norm(dim=1)).sum()
        assert error.sum() <= limit * rows.shape[0] + SKIP_ROUNDING * scale


def _leaves(spec: LossSpec, memory: bool, spread: float, device: str):
    """Leaves, the call, and the parameters of a problem in which part of the tiles are light."""
    rows, columns, labels = (t.to(device) for t in separated(0, IDENTITIES, spread))
    leaves = {"rows": rows}
    function = getattr(unitsface_kernels, spec.function)
    # Between the positives' logits and the negatives'; SphereFace2's scores are shifted by it.
    threshold = torch.tensor(0.0 if spec.name == "sphereface2" else 40.0, device=device)
    if spec.threshold == "per_column":
        threshold = torch.full((IDENTITIES,), 40.0, device=device)
    if spec.threshold != "none":
        leaves["b"] = threshold
    options = {"scale": 64.0} if "scale" in spec.defaults() else {}
    if spec.name == "sphereface2":
        options["margin"] = 0.1
    # Options under which pairs reach the largest slope.
    if spec.name == "contrastive":
        options = {"distance": "cosine", "negative_margin": 0.2}
    if spec.topology == "class" or memory:
        leaves["columns"] = columns

    def loss(rows, columns=None, b=None, **static):
        thresholds = () if b is None else (b,)
        static = options | static
        if spec.topology == "class":
            return function(rows, columns, labels, *thresholds, **static)
        if columns is not None:
            static["memory"] = columns
            static["memory_labels"] = torch.arange(IDENTITIES, device=device)
        return function(rows, labels, *thresholds, **static)

    return leaves, loss, spec.pack({**spec.defaults(), **options})


def _decisions(monkeypatch) -> list[bool]:
    """Filled with whether tiles, or some rows of them, were left out."""
    decisions: list[bool] = []
    skips_tile, rows_to_keep = filtering.RowFilter.skips_tile, filtering.RowFilter.rows_to_keep
    negligible = filtering.negligible

    def spied_skips_tile(*arguments) -> bool:
        decisions.append(skips_tile(*arguments))
        return decisions[-1]

    def spied_rows_to_keep(self, tile, rows):
        indices = rows_to_keep(self, tile, rows)
        kept = tile.shape[0] if indices is None else len(indices)
        decisions.extend([True] * (kept < tile.shape[0]) + [False] * (kept > 0))
        return indices

    def spied_negligible(*arguments) -> list[bool]:
        found = negligible(*arguments)
        decisions.extend(found)
        return found

    monkeypatch.setattr(filtering.RowFilter, "skips_tile", spied_skips_tile)
    monkeypatch.setattr(filtering.RowFilter, "rows_to_keep", spied_rows_to_keep)
    monkeypatch.setattr(logsumexp, "negligible", spied_negligible)
    select = filtering.selections

    def spied_selections(needed: Tensor) -> list[RowSelection]:
        decisions.extend((~needed).flatten().tolist())
        return select(needed)

    for module in (filtering, logsumexp, sums):
        monkeypatch.setattr(module, "selections", spied_selections)
    return decisions


def _bound_cases():
    """One loss per driver in the interpreter: skipping is the driver's work."""
    for target in FUSED:
        for spec in SKIPPING:
            if target.interpreted and spec.name not in ("uss", "margin_softmax"):
                continue
            for memory in (False, True) if spec.topology == "pair" else (False,):
                for reduction in ("mean",) if target.interpreted else ("mean", "none"):
                    name = f"{target}-{spec.name}-{reduction}" + ("-memory" if memory else "")
                    first = spec.name in ("uss", "margin_softmax") and not memory
                    marks = extended_if(target.interpreted and not first)
                    yield pytest.param(target, spec, memory, reduction, id=name, marks=marks)


@pytest.mark.parametrize(("target", "spec", "memory", "reduction"), list(_bound_cases()))
def test_bound(target: Target, spec: LossSpec, memory: bool, reduction: str, monkeypatch) -> None:
    patched_blocks(monkeypatch, BLOCKS)
    decisions = _decisions(monkeypatch)
    leaves, loss, params = _leaves(spec, memory, 2.0, target.device)
    rows, columns = leaves["rows"], leaves.get("columns")
    upstream = weights = torch.ones((), device=target.device)
    if reduction == "mean":
        weights = weights / ROWS
    else:
        upstream = weights = torch.linspace(-2.0, 1.0, ROWS, device=target.device)
    call = {"backend": target.backend, "reduction": reduction}
    values, exact = _gradients(lambda **k: loss(**k, **call), leaves, upstream, 0.0)
    skipped_values, found = _gradients(lambda **k: loss(**k, **call), leaves, upstream, TOLERANCE)
    assert torch.equal(values, skipped_values)
    if "b" in found:
        assert torch.equal(found["b"], exact["b"])
    # Slopes of negatives that do not vanish leave nothing to skip.
    if "scale" in spec.defaults() or spec.name == "contrastive":
        assert True in decisions, "nothing was skipped"
    assert False in decisions, "everything was skipped"
    _check_bound(spec, params, rows, columns, exact, found, weights)


def test_bound_with_more_rows_than_features(monkeypatch) -> None:
    """Some cosines are kept, and fewer rows are wanted than there are."""
    monkeypatch.setitem(globals(), "DIM", 32)
    patched_blocks(monkeypatch, BLOCKS)
    spec = REGISTRY["margin_softmax"]
    leaves, loss, params = _leaves(spec, False, 2.0, "cpu")
    run = partial(loss, backend="native", scale=200.0)
    _, exact = _gradients(run, leaves, torch.tensor(1.0), 0.0)
    _, found = _gradients(run, leaves, torch.tensor(1.0), TOLERANCE)
    params = (200.0, *params[1:])
    weights = torch.tensor(1.0 / ROWS)
    _check_bound(spec, params, leaves["rows"], leaves["columns"], exact, found, weights)


def test_learned_rows_are_left_out_of_tiles(monkeypatch) -> None:
    """One hard row in each block of rows: only those are multiplied again."""
    patched_blocks(monkeypatch, BLOCKS)
    shapes = []
    method = CpuEngine.both_products

    def spied(self, tile, *operands):
        shapes.append(tile.shape[0])
        return method(self, tile, *operands)

    monkeypatch.setattr(CpuEngine, "both_products", spied)
    leaves, loss, _ = _leaves(REGISTRY["margin_softmax"], False, 0.0, "cpu")
    leaves["rows"][::8] = torch.randn(ROWS // 8, DIM)
    _gradients(partial(loss, backend="native"), leaves, torch.tensor(1.0), TOLERANCE)
    assert set(shapes) == {ROWS // 8}


@pytest.mark.parametrize("name", ["margin_softmax", "uce"])
def test_a_million_flat_scores_are_not_negligible(name: str) -> None:
    """Each of 10^6 equal negatives weighs 10^-6: under any cut-off per pair all would go.

    The gradient of a row cancels to nothing here, which leaves the rounding of eager float32.
    """
    generator = torch.Generator().manual_seed(0)
    count, dim = 1_000_000, 8
    weight = torch.randn(1, dim, generator=generator).expand(count, dim).clone()
    feats = torch.randn(2, dim, generator=generator)
    labels = torch.tensor([0, 500_000])
    spec = REGISTRY[name]
    cosine = normalize(feats[:1], dim=1) @ normalize(weight[:1], dim=1).T
    b = () if spec.threshold == "none" else (64.0 * float(cosine) + math.log(1e6),)
    run = partial(getattr(unitsface_kernels, spec.function), reduction="sum")

    def gradients(dtype: torch.dtype, **options) -> dict[str, Tensor]:
        leaves = {"rows": feats.to(dtype).clone(), "columns": weight.to(dtype).clone()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        run(leaves["rows"], leaves["columns"], labels, *b, **options).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    truth = gradients(torch.float64, backend="reference")
    eager = gradients(torch.float32, backend="reference")
    found = gradients(torch.float32, backend="native", skip_tolerance=TOLERANCE)
    limit = TOLERANCE * spec.slope_bound(spec.pack(spec.defaults()))
    for leaf, rows in (("rows", feats), ("columns", weight)):
        norms = rows.norm(dim=1)
        error, rounding = ((g[leaf] - truth[leaf]).norm(dim=1) * norms for g in (found, eager))
        assert error.sum() <= len(labels) * limit + 2.0 * rounding.sum()
    # A thousandth of the mass of about one may go, and no more does.
    touched = (found["columns"] != 0.0).any(dim=1)
    assert touched.float().mean() > 0.99


def test_separated_classes_take_no_gradient_gemm(monkeypatch) -> None:
    """Every row is at its class: no gradient GEMM is needed."""
    patched_blocks(monkeypatch, BLOCKS)
    calls = []
    for name in ("addmm", "matmul", "both_products"):
        method = getattr(CpuEngine, name)

        def counted(self, *arguments, method=method):
            calls.append(arguments)
            return method(self, *arguments)

        monkeypatch.setattr(CpuEngine, name, counted)
    leaves, loss, _ = _leaves(REGISTRY["margin_softmax"], False, 0.0, "cpu")
    run = lambda **k: loss(**k, backend="native", m3=0.0)  # noqa: E731
    _, exact = _gradients(run, leaves, torch.tensor(1.0), 0.0)
    assert len(calls) == -(-ROWS // BLOCKS[0]) * -(-IDENTITIES // BLOCKS[1])
    calls.clear()
    _, found = _gradients(run, leaves, torch.tensor(1.0), TOLERANCE)
    assert not calls
    # The targets are not skipped.
    assert bool((found["columns"] != 0.0).any())
    assert exact["columns"].shape == found["columns"].shape


def test_of_a_sampled_subset_and_ignored_rows(monkeypatch) -> None:
    patched_blocks(monkeypatch, BLOCKS)
    p = problem(REGISTRY["margin_softmax"], "cpu", rows=37, columns=200, subset=True,
                labels="ignored")  # fmt: skip
    exact = p.evaluate("native")
    p.values = {**p.values, "skip_tolerance": 1e-9}
    found = p.evaluate("native")
    for name, gradient in exact[1].items():
        check_same(name, found[1][name], gradient, SAME_GRADIENT)


@each_target
def test_retained_graph(target: Target, monkeypatch) -> None:
    patched_blocks(monkeypatch, BLOCKS)
    names = ("margin_softmax",) if target.interpreted else ("uss", "margin_softmax")
    for spec in map(REGISTRY.get, names):
        leaves, loss, _ = _leaves(spec, False, 2.0, target.device)
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        value = loss(**leaves, backend=target.backend, skip_tolerance=TOLERANCE)
        first = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(value, list(leaves.values()))
        for name, a, b in zip(leaves, first, second, strict=True):
            check_same(name, b, a, SAME_GRADIENT)


def test_targets_are_added_before_rounding(monkeypatch) -> None:
    """Many rows of one class with bfloat16 weights: their sum is rounded once, not row by row."""
    patched_blocks(monkeypatch, (128, 64))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 32, generator=generator).bfloat16()
    labels = torch.randint(0, 2, (300,), generator=generator) * 150
    # Alike, so that what they contribute does not cancel.
    rows = (torch.randn(1, 32, generator=generator) + 0.1 * weight[labels].float()).bfloat16()

    def gradient(tolerance: float) -> Tensor:
        leaf = weight.clone().requires_grad_()
        unitsface_kernels.fused_margin_softmax_loss(
            rows,
            leaf,
            labels,
            reduction="sum",
            backend="native",
            skip_tolerance=tolerance,
        ).backward()
        assert leaf.grad is not None
        return leaf.grad[[0, 150]].double()

    exact = gradient(0.0)
    assert (gradient(1e-2) - exact).norm() < ROUNDED_ONCE * exact.norm()


def test_nan_is_not_negligible(monkeypatch) -> None:
    patched_blocks(monkeypatch, BLOCKS)
    for spec in (REGISTRY["uss"], REGISTRY["margin_softmax"]):
        leaves, loss, _ = _leaves(spec, False, 0.0, "cpu")
        leaves["rows"][3, 5] = math.nan
        run = lambda loss=loss, **k: loss(**k, backend="native")  # noqa: E731
        _, found = _gradients(run, leaves, torch.tensor(1.0), 0.1)
        assert bool(found["rows"][3].isnan().any())


@pytest.mark.parametrize("seed", range(60))
def test_negligible_tiles(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    # From 0 to 1, over several orders of magnitude.
    table = draw(1 + seed % 8, 3) ** (8.0 * draw(1, 1)) * (draw(1 + seed % 8, 3) > 0.2)
    tolerance = float(10.0 ** (-6.0 * draw(1)))
    skipped = torch.tensor(filtering.negligible(table, tolerance))
    spent = table.double()[skipped].sum(dim=0)
    assert bool((spent <= tolerance * (1 + 1e-12)).all())
    # Every further tile that is no heavier than the lightest one kept would break the bound.
    if not bool(skipped.all()):
        lightest = table[~skipped].amax(dim=1).argmin()
        assert bool((spent + table[~skipped][lightest].double() > tolerance).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absolute_sums_on_the_cpu(dtype: torch.dtype) -> None:
    """Tiles are no whole number of chunks or vectors; NaN stays in its row and column."""
    engine = CpuEngine(None, torch.device("cpu"))
    for shape in ((70, 131), (1, 3), (5, 0)):
        tile = torch.randn(shape).to(dtype)
        tile[3:4, 5:6] = math.nan
        for dim in (0, 1):
            want = tile.float().abs().sum(dim)
            torch.testing.assert_close(engine.absolute_sums(tile, dim), want, equal_nan=True)


def test_negligible_tiles_with_nan() -> None:
    table = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    assert filtering.negligible(table, 1.0) == [False, True]


def test_torch_compile_takes_it() -> None:
    leaves, loss, _ = _leaves(REGISTRY["uss"], False, 2.0, "cpu")
    run = torch.compile(loss, backend="aot_eager", fullgraph=True)
    rows = leaves["rows"].clone().requires_grad_()
    run(rows, b=leaves["b"], backend="native", skip_tolerance=TOLERANCE).backward()
    other = leaves["rows"].clone().requires_grad_()
    loss(other, b=leaves["b"], backend="native", skip_tolerance=TOLERANCE).backward()
    assert torch.equal(rows.grad, other.grad)


@pytest.mark.parametrize(
    ("value", "error"), [(-1e-3, ValueError), (math.nan, ValueError), ("1e-3", TypeError)]
)
def test_bad_tolerance(value, error) -> None:
    feats, labels = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(error, match="skip_tolerance"):
        fused_uss_loss(feats, labels, 0.0, skip_tolerance=value)
