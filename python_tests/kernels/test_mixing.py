"""Columns into which rows are mixed tile by tile, against the matrix of mixed columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.grid import extended_if
from support.helpers import FUSED, Target, patched_blocks
from support.rounding import spreads
from support.tolerances import check_all
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import passes
from unitsface_kernels.backends import reference
from unitsface_kernels.backends.streaming import (
    CallConfig,
    CallTensors,
    Changes,
    ForwardCache,
    Mixing,
    make_call,
)
from unitsface_kernels.losses import REGISTRY

N, C, D = 21, 37, 24
each_target = pytest.mark.parametrize("target", FUSED, ids=str)


def _unit_rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def _problem() -> tuple[CallTensors, Tensor, Tensor]:
    """A call's tensors, rows to mix and their shares, of which some are 0."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(N, D, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    labels[[2, 9]] = -1
    columns = 3.0 * torch.randn(C, D, generator=generator)
    share = torch.rand(C, generator=generator)
    share[::3] = 0.0
    share[4] = 1.0
    return CallTensors(rows, labels, columns), _unit_rows(C, 6), share


def _move(rows: Tensor, moment: Changes, seed: int) -> Changes:
    """Replaces some rows, one of them twice, as a module does."""
    slots = torch.tensor([*range(seed, C, 3), seed + 3], device=rows.device)
    moment = moment.then(slots, rows[slots])
    rows[slots] = _unit_rows(C, seed).to(rows)[slots]
    return moment


def _dense(config: CallConfig, tensors: CallTensors, mixed: Tensor, share: Tensor):
    """Loss and gradients in float64, from the mixed matrix."""
    config = replace(config, backend="reference", skip_tolerance=0.0)
    mixed, share = mixed.double(), share.double()[:, None]

    def evaluate() -> dict[str, Tensor]:
        given = {
            name: t.detach().double().requires_grad_()
            for name, t in tensors._asdict().items()
            if name in ("rows", "columns", "threshold") and t is not None
        }
        weight = given["columns"]
        columns = (1.0 - share) * F.normalize(weight, dim=1, eps=1e-5) + share * mixed
        columns = torch.where(share > 0.0, columns, weight)
        used = tensors._replace(**{**given, "columns": columns})
        loss = reference.similarity_loss(config, *used)
        names = list(given)
        gradients = torch.autograd.grad(loss, [given[name] for name in names])
        return {"loss": loss, **dict(zip(names, gradients, strict=True))}

    return spreads(evaluate)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [
        ("margin_softmax", 0.0),
        pytest.param("margin_softmax", 1e-6, marks=pytest.mark.extended),
        ("uce", 0.0),
        pytest.param("npt", 0.0, marks=pytest.mark.extended),
    ],
)
@each_target
def test_mixed_columns_are_those_of_the_matrix(
    target: Target, loss: str, tolerance: float, subset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not target.interpreted:
        patched_blocks(monkeypatch, (8, 16))
    spec = REGISTRY[loss]
    tensors, mixed, share = _problem()
    index = None
    if subset:
        index = torch.arange(0, C, 2)
        labels = torch.where(tensors.row_labels >= 0, tensors.row_labels % len(index), -1)
        tensors = tensors._replace(row_labels=labels, column_index=index)
    if spec.threshold != "none":
        tensors = tensors._replace(threshold=torch.tensor(2.0))
    config = CallConfig(
        spec,
        spec.pack({**spec.defaults(), **({} if loss == "npt" else {"scale": 16.0})}),
        "mean",
        target.backend,
        torch.float32,
        skip_tolerance=tolerance,
        need_rows=True,
        need_columns=True,
        need_threshold=spec.threshold != "none",
    )
    want = _dense(config, tensors, mixed, share)

    there = CallTensors(*(None if t is None else t.to(target.device) for t in tensors))
    rows, now = mixed.to(target.device), Changes()
    call = make_call(config, there, ForwardCache())
    call = replace(call, mixing=Mixing(rows, share.to(target.device), now))
    result = passes.forward(call, gradients=spec.reduction == "sum")
    gradients = result.gradients
    for seed in (1, 2):
        now = _move(rows, now, seed)
    if spec.reduction != "sum":
        ones = torch.ones_like(result.loss)
        gradients = passes.backward_of_loss(call, result.state, ones)
    found = {"loss": result.loss, "rows": gradients.rows}
    d_columns = gradients.columns
    if index is not None:
        d_columns = torch.zeros(C, D, device=target.device).index_copy(
            0, index.to(target.device), d_columns
        )
    found["columns"] = d_columns
    if gradients.threshold is not None:
        found["threshold"] = gradients.threshold.reshape(())
    check_all({name: t.detach() for name, t in found.items()}, want)
    # What moved matters.
    plain = _dense(config, tensors, rows.cpu(), share)
    assert max(float((plain[k].want - want[k].want).abs().max()) for k in want) > 1e-3


def test_only_who_looks_back_keeps_what_was_replaced() -> None:
    rows, moment = _unit_rows(C, 1), Changes()
    early = Mixing(rows, torch.ones(C), moment)
    first = rows.clone()
    moment = _move(rows, moment, 1)
    late, second = Mixing(rows, torch.ones(C), moment), rows.clone()
    moment = _move(rows, moment, 4)
    everything, some = torch.arange(C), torch.tensor([30, 0, 8, 8, 12, 3])
    for mixing, then in ((early, first), (late, second), (Mixing(rows, early.share, moment), rows)):
        assert torch.equal(mixing.part(0, C, None)[0], then)
        assert torch.equal(mixing.part(2, 9, everything)[0], then[2:9])
        assert torch.equal(mixing.part(0, 6, some)[0], then[some])
    assert moment.later is None
    assert moment.before is None


@pytest.mark.parametrize("check", [False, pytest.param(True, marks=extended_if(True))])
def test_checks_pass_mixed_columns(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``UNITSFACE_CHECK=1`` identifies columns by the call's tensor, mixed or not."""
    monkeypatch.setenv("UNITSFACE_CHECK", str(int(check)))
    tensors, mixed, share = _problem()
    spec = REGISTRY["margin_softmax"]
    config = CallConfig(
        spec, spec.pack(spec.defaults()), "mean", "native", torch.float32, need_columns=True
    )
    call = replace(make_call(config, tensors), mixing=Mixing(mixed, share, Changes()))
    result = passes.forward(call, gradients=False)
    gradients = passes.backward_of_loss(call, result.state, torch.ones_like(result.loss))
    assert gradients.columns is not None
    assert bool(gradients.columns.isfinite().all())
