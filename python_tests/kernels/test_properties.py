"""Relations that hold for every input, on drawn problems: no formula, each backend by itself.

test_semantics.py has the relations for which one input, chosen well, says more.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from support.cases import Problem
from support.draws import Draw, check_equal, for_all, losses
from support.helpers import Target
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels.backends import reference
from unitsface_kernels.backends.streaming import CallConfig, CallTensors
from unitsface_kernels.losses import LossSpec
from unitsface_kernels.ops import Arguments

ELSEWHERE = -2  # the operators' label of a row whose class is in another shard


def _selected(p: Problem, rows: Tensor) -> Problem:
    upstream = p.upstream[rows] if p.reduction == "none" else p.upstream
    return replace(p, rows=p.rows[rows], labels=p.labels[rows], upstream=upstream)


@for_all(losses())
def test_order_of_rows(target: Target, spec: LossSpec, drawn: Draw) -> None:
    p = drawn.build(spec, target.device)
    order = torch.randperm(drawn.rows, device=target.device)
    loss, gradients = p.evaluate(target.backend)
    gradients["rows"] = gradients["rows"][order]
    loss = loss[order] if drawn.reduction == "none" else loss
    moved = _selected(p, order)
    check_equal(moved, moved.evaluate(target.backend), (loss, gradients))


@for_all(losses())
def test_order_of_columns(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """Labels and thresholds follow their columns."""
    p = drawn.build(spec, target.device, columns=True)
    assert p.columns is not None
    order = torch.randperm(len(p.columns), device=target.device)
    moved = replace(p, columns=p.columns[order])
    loss, gradients = p.evaluate(target.backend)
    gradients["columns"] = gradients["columns"][order]
    if spec.topology == "pair":
        moved.column_labels = p.column_labels[order]
    else:
        moved.labels = torch.argsort(order)[p.labels.clamp(min=0)].where(p.labels >= 0, -1)
        if spec.threshold == "per_column":
            moved.b, gradients["b"] = p.b[order], gradients["b"][order]
    check_equal(moved, moved.evaluate(target.backend), (loss, gradients))


@for_all(losses())
def test_norms_do_not_matter(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """The loss stays, gradients shrink as features grow, and have no part along them."""
    p = drawn.build(spec, target.device)
    longer, factors = replace(p), {}
    for name in ("rows", "columns"):
        features = getattr(p, name)
        if features is not None:
            factors[name] = 10 ** (6 * torch.rand(len(features), 1, device=target.device) - 3)
            setattr(longer, name, features * factors[name])
    loss, gradients = longer.evaluate(target.backend)
    for name, factor in factors.items():
        gradients[name] *= factor
    wanted_loss, wanted = p.evaluate(target.backend)
    across = dict(wanted)
    for name in factors:
        unit = F.normalize(getattr(p, name).double(), dim=1)
        along = (gradients[name].double() * unit).sum(dim=1, keepdim=True)
        across[name] = gradients[name].double() - along * unit
    check_equal(p, (loss, gradients), (wanted_loss, wanted), (wanted_loss, across))


@for_all(losses())
def test_an_ignored_row_is_an_absent_row(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """In-batch it is an absent column too."""
    p = drawn.build(spec, target.device)
    keep = torch.rand(drawn.rows, device=target.device) > 0.3
    loss, gradients = replace(p, labels=p.labels.where(keep, -1)).evaluate(target.backend)
    assert not bool(gradients["rows"][~keep].any())
    gradients["rows"] = gradients["rows"][keep]
    if drawn.reduction == "none":
        assert not bool(loss[~keep].any())
        loss = loss[keep]
    absent = _selected(p, keep)
    check_equal(absent, (loss, gradients), absent.evaluate(target.backend))


@for_all(losses("pair"))
def test_names_of_identities_do_not_matter(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """A bijection of the labels; thresholds follow their identities."""
    p = drawn.build(spec, target.device)
    names = torch.randperm(drawn.identities, device=target.device)
    renamed = replace(p)
    loss, gradients = p.evaluate(target.backend)
    if spec.threshold == "per_column":
        renamed.b, gradients["b"] = p.b[torch.argsort(names)], gradients["b"][torch.argsort(names)]
    else:
        names = names * 2**33 + 2**31 + drawn.seed
    for name in ("labels", "column_labels"):
        labels = getattr(p, name)
        if labels is not None:
            setattr(renamed, name, names[labels.clamp(min=0)].where(labels >= 0, -1))
    check_equal(p, renamed.evaluate(target.backend), (loss, gradients))


@for_all(losses("pair"))
def test_the_batch_is_a_memory_at_offset_zero(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """Its gradient is that of the rows and that of the memory together."""
    p = replace(drawn.build(spec, target.device), columns=None, column_labels=None)
    memory = replace(
        p,
        columns=p.rows.clone(),
        column_labels=p.labels.clone(),
        values={**p.values, "batch_offset": 0},
    )
    loss, gradients = memory.evaluate(target.backend)
    gradients["rows"] += gradients.pop("columns")
    check_equal(p, p.evaluate(target.backend), (loss, gradients))


@for_all(losses("pair"))
def test_the_batch_is_a_memory_without_oneself(target: Target, spec: LossSpec, drawn: Draw) -> None:
    p = replace(drawn.build(spec, target.device), columns=None, column_labels=None)
    p.reduction, p.upstream = "none", torch.ones(drawn.rows, device=target.device)
    together = p.loss(target.backend)
    for i in range(min(3, drawn.rows)):
        others = torch.arange(drawn.rows, device=target.device) != i
        one = slice(i, i + 1)
        alone = _selected(p, one)
        alone.columns, alone.column_labels = p.rows[others], p.labels[others]
        check_equal(alone, (together[one], {}), (alone.loss(target.backend), {}))


# --- columns in two blocks ------------------------------------------------------------------------


def _blocks(p: Problem) -> tuple[Tensor, Tensor]:
    """Two parts of the columns' positions; the first has at least one."""
    assert p.columns is not None
    order = torch.randperm(len(p.columns), device=p.rows.device)
    return order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]


def _of_block(p: Problem, backend: str, block: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Losses per row against a block of the columns, as a shard of them has it."""
    columns, b = leaves["columns"], leaves.get("b")
    if p.spec.topology == "pair":
        own = {"columns": columns[block], "column_labels": p.column_labels[block]}
        return p.loss(backend, reduction="none", **{**leaves, **own})
    place = torch.full((len(columns),), ELSEWHERE, device=p.rows.device)
    place[block] = torch.arange(len(block), device=p.rows.device)
    labels = place[p.labels.clamp(min=0)].where(p.labels >= 0, -1)
    if p.spec.threshold == "per_column":
        b = b[block]
    params = p.spec.pack({**p.spec.defaults(), **p.values})
    tensors = CallTensors(leaves["rows"], labels, columns, None, block, b)
    config = CallConfig(
        p.spec,
        params,
        "none",
        backend,
        p.rows.dtype,
        None,
        0.0,
        *(t is not None and t.requires_grad for t in (leaves["rows"], columns, b)),
    )
    if backend == "reference":
        return reference.similarity_loss(config, *tensors)
    return torch.ops.unitsface.similarity_loss(*Arguments.of(config, tensors))[0]


@for_all(losses(reduction="sum"))
def test_blocks_of_columns_add_up(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """Values and gradients; a row meets its class in one block at most."""
    p = replace(drawn.build(spec, target.device, columns=True), reduction="none")
    p.upstream = 0.5 + torch.rand(drawn.rows, device=target.device)
    leaves = p.leaves()
    total = sum(_of_block(p, target.backend, block, leaves) for block in _blocks(p))
    total.backward(p.upstream)
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    check_equal(p, (total.detach(), gradients), p.evaluate(target.backend))


@for_all([spec for spec in losses("pair", "logsumexp") if spec.positive is None])
def test_negatives_of_blocks_merge(target: Target, spec: LossSpec, drawn: Draw) -> None:
    p = replace(drawn.build(spec, target.device, columns=True), reduction="none")
    p.upstream = torch.ones(drawn.rows, device=target.device)
    negative = p.pairs()[1]
    merged = torch.full((drawn.rows,), -torch.inf, device=target.device, dtype=torch.float64)
    for block in _blocks(p):
        value = _of_block(p, target.backend, block, p.leaves()).detach().double()
        # A row without negatives in a block is not counted there, which makes it 0.
        value = value.where(negative[:, block].any(dim=1), -torch.inf)
        merged = torch.logaddexp(merged, value)
    merged = merged.where(negative.any(dim=1), 0.0)
    whole = p.loss(target.backend)
    assert torch.equal(whole.isneginf(), merged.isneginf())
    finite = whole.isfinite()
    check_equal(_selected(p, finite), (whole[finite], {}), (merged[finite], {}))


@for_all([s for s in losses("class", "logsumexp") if not s.variables and s.finish is None])
def test_a_shard_without_the_target_adds_its_negatives(
    target: Target, spec: LossSpec, drawn: Draw
) -> None:
    """softplus(N - z) from its value with some of the negatives, and N of the others."""
    p = replace(drawn.build(spec, target.device, columns=True), reduction="none")
    p.upstream = torch.ones(drawn.rows, device=target.device)
    assert p.columns is not None
    here, there = _blocks(p)
    whole = p.loss(target.backend)
    values = [_of_block(p, target.backend, block, p.leaves()).double() for block in (here, there)]
    within = torch.isin(p.labels, here)
    with_target = torch.where(within, *values)
    # A block without columns has no negatives.
    empty = len(there) == 0
    others = torch.where(within, -torch.inf if empty else values[1], values[0])
    cosine = reference.cosines(p.rows.double(), p.columns.double())
    cosine = cosine.gather(1, p.labels.clamp(min=0)[:, None])[:, 0]
    params = spec.pack({**spec.defaults(), **p.values})
    logit = spec.positive(cosine, None, params)
    # log(exp(.) - 1) is the inverse of softplus.
    gap = with_target + torch.log(-torch.expm1(-with_target))
    merged = F.softplus(torch.logaddexp(gap, others - logit)).where(p.labels >= 0, 0.0)
    check_equal(p, (whole, {}), (merged.detach(), {}))


@for_all(losses("class", "nearest"))
def test_nearest_of_blocks_merge(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """The largest k of the largest k of both blocks."""
    p = replace(drawn.build(spec, target.device, columns=True), reduction="none")
    p.upstream = torch.ones(drawn.rows, device=target.device)
    p.values["hinges"] = "mean"
    assert p.columns is not None
    # All rows have the same target, which is in both blocks.
    of_all = int(p.labels.amax().clamp(min=0))
    p.labels = p.labels.clamp(max=0).where(p.labels < 0, of_all)
    terms, most = [], 3
    for block in _blocks(p):
        block = torch.cat([block[block != of_all], block.new_tensor([of_all])])
        wrong = len(block) - 1
        # Means of the first k terms give the terms, which fall.
        sums = [torch.zeros(drawn.rows, dtype=torch.float64, device=target.device)]
        for k in range(1, min(most, wrong) + 1):
            p.values["k"] = k
            sums.append(k * _of_block(p, target.backend, block, p.leaves()).detach().double())
        terms += [after - before for before, after in pairwise(sums)]
    p.values["k"] = most
    found = torch.stack([torch.zeros_like(sums[0]), *terms], dim=1)[:, 1:]
    merged = found.topk(min(most, found.shape[1]), dim=1).values.sum(dim=1)
    merged = merged / max(1, min(most, found.shape[1]))
    check_equal(p, (p.loss(target.backend), {}), (merged, {}))
