"""Semantics of losses without formulas: relations that hold for each backend by itself.

They tie the reference too, which the parity tests can only compare with. Relations that hold for
any input at all are in test_properties.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import Problem, problem
from support.grid import calls
from support.helpers import TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels import dispatch
from unitsface_kernels.losses import REGISTRY, LossSpec

each_call = pytest.mark.parametrize(("target", "spec"), calls(TARGETS))
each_pair_call = pytest.mark.parametrize(
    ("target", "spec"), calls(TARGETS, [s for s in REGISTRY.values() if s.topology == "pair"])
)
each_class_call = pytest.mark.parametrize(
    ("target", "spec"), calls(TARGETS, [s for s in REGISTRY.values() if s.topology == "class"])
)
both_shapes = pytest.mark.parametrize("columns", [None, 12], ids=["few", "columns"])


def _same(target: Target, first: Problem, second: Problem, only: tuple[str, ...] = ()) -> None:
    """Equal losses, and equal gradients of the tensors that have the same shape."""
    loss, gradients = first.evaluate(target.backend)
    other_loss, other = second.evaluate(target.backend)
    check_same("loss", loss, other_loss, SAME_LOSS)
    for name in [name for name in gradients if name in only] if only else gradients:
        check_same(name, gradients[name], other[name], SAME_GRADIENT)


def _some(count: int, device: str) -> Tensor:
    return torch.arange(count, device=device) % 3 != 0


@each_pair_call
def test_an_ignored_column_is_an_absent_column(target: Target, spec: LossSpec) -> None:
    p = problem(spec, target.device, rows=7, columns=12)
    keep = _some(12, target.device)
    ignoring = replace(p, column_labels=p.column_labels.where(keep, -1))
    absent = replace(p, columns=p.columns[keep], column_labels=p.column_labels[keep])
    _same(target, ignoring, absent, ("rows", "b"))
    of_columns = ignoring.evaluate(target.backend)[1]["columns"]
    want = absent.evaluate(target.backend)[1]["columns"]
    check_same("columns", of_columns[keep], want, SAME_GRADIENT)
    assert not bool(of_columns[~keep].any())


@each_call
@both_shapes
def test_reductions(target: Target, spec: LossSpec, columns: int | None) -> None:
    """Sum and mean are those of the valid rows, and so are their gradients."""
    p = problem(spec, target.device, rows=10, columns=columns, labels="ignored")
    valid = p.valid_rows()
    count = int(valid.sum())
    assert 0 < count < 10
    per_row = p.loss(target.backend, reduction="none")
    assert per_row.shape == (10,)
    assert not bool(per_row[~valid].any())
    some = valid
    if spec.reduction == "logsumexps":
        # A row without pairs of a kind counts, and its loss may be 0.
        some = torch.stack([valid, *(pairs.any(dim=1) for pairs in p.pairs())]).all(dim=0)
    if spec.name in ("batch_hard", "contrastive", "proxy_nca"):
        # Hinges leave rows without a loss, and without the target in its sum one may be negative.
        assert bool(per_row[some].any())
    else:
        assert bool((per_row[some] > 0).all())
    check_same("sum", p.loss(target.backend, reduction="sum"), per_row.sum(), SAME_LOSS)
    check_same("mean", p.loss(target.backend), per_row.sum() / count, SAME_LOSS)
    one = torch.ones((), device=target.device)
    _, of_sum = replace(p, reduction="sum", upstream=one).evaluate(target.backend)
    _, of_mean = replace(p, upstream=one * count).evaluate(target.backend)
    _, of_none = replace(p, reduction="none", upstream=one.expand(10)).evaluate(target.backend)
    for name, gradient in of_sum.items():
        check_same(f"mean {name}", of_mean[name], gradient, SAME_GRADIENT)
        check_same(f"none {name}", of_none[name], gradient, SAME_GRADIENT)


@each_call
def test_rows_weigh_as_their_upstream_gradient(target: Target, spec: LossSpec) -> None:
    """A weight of 0 takes a row out, in-batch only as a row."""
    p = problem(spec, target.device, rows=9, columns=6, reduction="none")
    weights = torch.arange(9.0, device=target.device)
    _, gradients = replace(p, upstream=weights).evaluate(target.backend)
    total = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for i in range(9):
        only = torch.zeros(9, device=target.device)
        only[i] = float(i)
        for name, gradient in replace(p, upstream=only).evaluate(target.backend)[1].items():
            total[name] += gradient
    for name, gradient in gradients.items():
        check_same(name, gradient, total[name], SAME_GRADIENT)
    assert not bool(gradients["rows"][0].any())


@each_class_call
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_sampled_classes_are_gathered_classes(
    target: Target, spec: LossSpec, dtype: torch.dtype
) -> None:
    p = problem(spec, target.device, rows=7, columns=12, labels="ignored", subset=True)
    assert p.index is not None
    of_sample = replace(p, index=p.index.to(dtype))
    alone = replace(p, columns=p.columns[p.index], index=None)
    if spec.threshold == "per_column":
        alone.b = p.b[p.index]
    _same(target, of_sample, alone, ("rows",))
    _, sampled = of_sample.evaluate(target.backend)
    _, gathered = alone.evaluate(target.backend)
    want = torch.zeros_like(p.columns).index_copy(0, p.index, gathered["columns"])
    check_same("columns", sampled["columns"], want, SAME_GRADIENT)
    rest = torch.ones(12, dtype=torch.bool, device=target.device)
    rest[p.index] = False
    assert bool(rest.any())
    assert not bool(sampled["columns"][rest].any())


@each_pair_call
@both_shapes
def test_only_equality_of_labels_counts(
    target: Target, spec: LossSpec, columns: int | None
) -> None:
    """Labels may agree in their low or in their high 32 bits."""
    if spec.threshold == "per_column":
        pytest.skip("labels select a threshold")
    p = problem(spec, target.device, rows=9, columns=columns, labels="ignored")
    want = p.loss(target.backend)

    def renamed(labels: Tensor | None, table: Tensor) -> Tensor | None:
        if labels is None:
            return None
        return table.to(labels.device)[labels.clamp(min=0)].where(labels >= 0, -1)

    for table in (
        [7, 3, 1],
        [2**31 - 1, 0, 2**31],
        [5, 5 + 2**32, 5 + 2**33],
        [2**63 - 1, 2**62, 2**62 + 1],
    ):
        names = torch.tensor(table)
        got = p.loss(
            target.backend,
            labels=renamed(p.labels, names),
            column_labels=renamed(p.column_labels, names),
        )
        check_same(f"loss with labels {table}", got, want, SAME_LOSS)


@each_call
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_of_every_integer_type(target: Target, spec: LossSpec, dtype: torch.dtype) -> None:
    """uint8 has no -1: 255 is an identity like another."""
    high = torch.iinfo(dtype).max if dtype != torch.int32 else 200
    high = min(high, 255)
    p = problem(spec, target.device, rows=6, columns=high + 1)
    labels = torch.tensor([0, high, 3, high, 3, high - 1], device=target.device)
    wide = {"labels": labels}
    if p.column_labels is not None:
        wide["column_labels"] = torch.arange(high + 1, device=target.device)
    narrow = {name: tensor.to(dtype) for name, tensor in wide.items()}
    _same(target, replace(p, **narrow), replace(p, **wide))
    if p.column_labels is not None:
        in_batch = replace(p, columns=None, column_labels=None)
        _same(target, replace(in_batch, labels=labels.to(dtype)), replace(in_batch, labels=labels))


@each_call
def test_rows_below_the_smallest_norm(target: Target, spec: LossSpec) -> None:
    """A norm below 1e-5 counts as 1e-5, as a constant: the gradient keeps its radial part."""
    p = problem(spec, target.device, rows=5, columns=6)
    unit = torch.nn.functional.normalize(p.rows, dim=1)
    short = replace(p, rows=unit * 1e-6)
    exact = short.converted(torch.float64)
    want_loss, want = exact.evaluate("reference")
    loss, gradients = short.evaluate(target.backend)
    check_same("loss", loss, want_loss, SAME_LOSS)
    for name, gradient in gradients.items():
        check_same(name, gradient, want[name], SAME_GRADIENT)
    radial = (gradients["rows"] * unit).sum(dim=1).abs()
    assert bool((radial > 0.01 * gradients["rows"].norm(dim=1)).any())


@each_call
def test_inputs_are_left_alone(target: Target, spec: LossSpec) -> None:
    p = problem(spec, target.device, rows=9, columns=6, labels="ignored")
    before = {name: value.clone() for name, value in vars(p).items() if isinstance(value, Tensor)}
    p.evaluate(target.backend)
    for name, value in before.items():
        assert torch.equal(getattr(p, name), value), name


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("device", sorted({target.device for target in TARGETS}))
def test_auto_is_the_first_available(spec: LossSpec, device: str) -> None:
    p = problem(spec, device, rows=9, columns=6)
    first = dispatch.available(device)[0]
    assert torch.equal(p.loss("auto"), p.loss(first))
    _, gradients = p.evaluate("auto")
    for name, gradient in p.evaluate(first)[1].items():
        assert torch.equal(gradient, gradients[name])
    # float64 is for the reference.
    double = p.converted(torch.float64)
    assert double.loss("auto").dtype == torch.float64
    assert torch.equal(double.loss("auto"), double.loss("reference"))
