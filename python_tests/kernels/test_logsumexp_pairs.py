"""Log-sum-exp over samples: rows without negatives, pairs left out, tiles that are not visited."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.cases import problem
from support.helpers import TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, TINY, check_same

import unitsface_kernels as uk
from unitsface_kernels.backends.native.cpu_engine import CpuEngine
from unitsface_kernels.losses import REGISTRY, LossSpec

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_loss = pytest.mark.parametrize(
    "spec",
    [s for s in REGISTRY.values() if s.topology == "pair" and s.reduction != "sum"],
    ids=lambda spec: spec.name,
)


@each_target
@pytest.mark.parametrize("memory", [False, True], ids=["batch", "memory"])
def test_rows_whose_negatives_are_all_left_out(target: Target, memory: bool) -> None:
    """-inf, and a gradient of exactly nothing; the other rows are unchanged."""
    # Rows 0 and 1 are opposite to every other identity, which the lower bound leaves out.
    feats = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, -0.2], [-0.9, 0.5]])
    feats = feats.to(target.device)
    labels = torch.tensor([0, 0, 1, 2, 2], device=target.device)
    columns = feats.clone().requires_grad_() if memory else None
    rows = feats.clone().requires_grad_()
    value = uk.fused_pair_logsumexp(
        rows,
        labels,
        memory=columns,
        memory_labels=labels if memory else None,
        scale=8.0,
        lower=-0.5,
        reduction="none",
        backend=target.backend,
    )
    assert value.isneginf().tolist() == [True, True, False, False, False]
    value.backward(torch.ones_like(value))
    assert rows.grad is not None
    assert not bool(rows.grad[:2].any())
    assert bool(rows.grad[2:].isfinite().all())
    assert bool(rows.grad[2:].any(dim=1).all())
    if columns is not None:
        assert columns.grad is not None
        assert not bool(columns.grad[:2].any())
        assert bool(columns.grad[2:].any(dim=1).all())


@each_target
def test_no_negatives(target: Target) -> None:
    """One identity: pair softmax is 0, the log-sum-exp has no row that counts."""
    feats = torch.randn(4, 5, device=target.device, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64, device=target.device)
    loss = uk.fused_pair_softmax_loss(feats, labels, backend=target.backend)
    loss.backward()
    assert feats.grad is not None
    assert float(loss.detach()) <= TINY
    assert float(feats.grad.abs().max()) <= TINY
    assert float(uk.uss_threshold_init(feats, labels, backend=target.backend)) == 0


@each_target
@each_loss
@pytest.mark.parametrize("offset", [0, 3])
def test_a_memory_that_holds_the_batch(target: Target, spec: LossSpec, offset: int) -> None:
    """The pair of a feature with itself is left out, wherever in the memory it lies."""
    p = problem(spec, target.device, rows=9, columns=5)
    columns = torch.cat([p.columns[:offset], p.rows, p.columns[offset:]])
    column_labels = torch.cat([p.column_labels[:offset], p.labels, p.column_labels[offset:]])
    held = replace(p, columns=columns, column_labels=column_labels, reduction="none")
    held.values = {**held.values, "batch_offset": offset}
    got = held.loss(target.backend)
    for i in range(9):
        others = torch.arange(14, device=target.device) != i + offset
        alone = p.loss(
            target.backend,
            rows=p.rows[i : i + 1],
            labels=p.labels[i : i + 1],
            columns=columns[others],
            column_labels=column_labels[others],
            reduction="none",
        )
        check_same("loss", got[i : i + 1], alone, SAME_LOSS)
    held.upstream = torch.ones(9, device=target.device)
    _, gradients = held.evaluate(target.backend)
    _, want = held.evaluate("reference")
    for name, gradient in gradients.items():
        check_same(name, gradient, want[name], SAME_GRADIENT)


@each_target
@each_loss
@pytest.mark.parametrize("columns", [None, 12], ids=["batch", "memory"])
def test_ignored_features_may_be_nan(target: Target, spec: LossSpec, columns: int | None) -> None:
    p = problem(spec, target.device, rows=12, columns=columns, labels="ignored")
    broken = {"rows": p.rows.clone()}
    broken["rows"][p.labels == -1] = torch.nan
    if p.columns is not None:
        broken["columns"] = p.columns.clone()
        broken["columns"][p.column_labels == -1] = torch.nan
    loss = p.loss(target.backend, **broken)
    check_same("loss", loss, p.loss(target.backend), SAME_LOSS)


def test_positives_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by identity, only tiles near the diagonal are visited; one identity spans several."""
    monkeypatch.setattr(CpuEngine, "sum_block", (8, 8))
    visited = []
    run = CpuEngine.pair_positives_tile

    def counting(self, tile, *sums):
        visited.append(tile)
        run(self, tile, *sums)

    labels = torch.cat([torch.arange(60) % 15, torch.full((20,), 15), torch.tensor([-1, 99])])
    labels = labels[torch.randperm(82)]
    feats = torch.randn(82, 16)
    with mock.patch.object(CpuEngine, "pair_positives_tile", counting):
        got = uk.fused_pair_softmax_loss(feats, labels, reduction="none", backend="native")
    want = uk.fused_pair_softmax_loss(feats, labels, reduction="none", backend="reference")
    check_same("loss", got, want, SAME_LOSS)
    # 80 rows with a positive in 10 blocks; of 55 tiles the last identity needs 6.
    assert 10 <= len(visited) <= 20
