"""Losses over the pairs of all ranks, against one process that has all batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.helpers import patched_blocks
from support.ranks import IDENTITIES, identities, normal, own_rows, run_ranks
from support.tolerances import (
    EXACT,
    SAME_GRADIENT,
    SAME_LOSS,
    check_same,
    conversion,
)
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

import unitsface_kernels as uk
from unitsface_kernels import dispatch
from unitsface_kernels.distributed.pairs import exchange as exchanges
from unitsface_kernels.distributed.pairs import takes_ring

D = 11
LOSSES = {
    "uss": uk.fused_uss_loss,
    "pair_bce": uk.fused_pair_bce_loss,
    "pair_softmax": uk.fused_pair_softmax_loss,
    "pair_logsumexp": uk.fused_pair_logsumexp,
    "circle": uk.fused_circle_loss,
    "contrastive": uk.fused_contrastive_loss,
    "batch_hard": uk.fused_triplet_loss,
    "multi_similarity": uk.fused_multi_similarity_loss,
}


def _soft(loss: str, scale: float) -> dict[str, float]:
    """Parameters with which no pair decides a row alone."""
    if loss in ("contrastive", "batch_hard"):
        return {}
    if loss == "multi_similarity":
        return {"alpha": scale / 2, "beta": scale}
    return {"scale": scale}


# Tiles of 7 x 7 in the own batch and of 7 x 4 elsewhere: several of each.
BATCHES = [
    *((6,), (0, 0), (5, 0, 23)),
    *(pytest.param(counts, marks=pytest.mark.extended) for counts in ((19, 4), (17, 3, 0, 9))),
]


def _threshold(loss: str, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"uss": (), "pair_bce": (IDENTITIES,)}
    if loss not in shapes:
        return {}
    return {"b": (3.0 + normal(*shapes[loss], seed=5)).to(dtype).requires_grad_()}


def _columns(kind: str, feats: Tensor, labels: Tensor, start: int) -> dict[str, Any]:
    """The batch itself, a memory that gets a gradient, or one that holds the batch."""
    if kind == "batch":
        return {}
    if kind == "holding":
        return {
            "memory": torch.cat([feats[:0], feats.detach()]),
            "memory_labels": labels,
            "batch_offset": start,
        }
    memory = normal(13, D, seed=3, dtype=feats.dtype).requires_grad_()
    return {"memory": memory, "memory_labels": identities(13, seed=4)}


def _evaluate(
    loss: str, feats: Tensor, labels: Tensor, upstream: Tensor, columns: dict, **options: Any
) -> list[Tensor]:
    """The loss, and the gradients of features, threshold and memory."""
    feats = feats.clone().requires_grad_()
    thresholds = _threshold(loss, torch.promote_types(feats.dtype, torch.float32))
    frozen = {
        name: t.clone()
        for name, t in columns.items()
        if isinstance(t, Tensor) and not columns["memory"].requires_grad
    }
    columns = {**columns, **frozen}
    value = LOSSES[loss](feats, labels, **thresholds, **_soft(loss, 8.0), **columns, **options)
    for t in frozen.values():  # a memory may be updated before the backward pass
        t.fill_(-1)
    inputs = [feats, *thresholds.values()]
    inputs += [t for t in columns.values() if isinstance(t, Tensor) and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, inputs, upstream)]


def _compare(
    rank: int,
    counts: Sequence[int],
    case: dict[str, str],
    exchange: str,
    dtype: torch.dtype = torch.float32,
    backend: str = "native",
) -> Tensor:
    """Asserts what every rank gets; returns the loss."""
    loss, reduction = case["loss"], case["reduction"]
    size, own = len(counts), own_rows(counts, rank)
    feats = normal(sum(counts), D, seed=1, dtype=dtype)
    labels = identities(sum(counts), seed=2)
    accuracy = torch.promote_types(dtype, torch.float32)
    if reduction == "none":
        upstream = normal(sum(counts), seed=6, dtype=accuracy)
        of_rank, of_all, share = upstream[own], upstream, 1 / size
    else:
        # Not the same on every rank: the objective is the mean of what ranks make of the loss.
        of_rank = torch.tensor(1.0 + rank, dtype=accuracy)
        of_all = torch.tensor(size * (size + 1) / 2, dtype=accuracy)
        share = 1 / size
    options = {"reduction": reduction, "backend": backend}
    kind = case["columns"]
    want = _evaluate(loss, feats, labels, of_all, _columns(kind, feats, labels, 0), **options)
    columns = _columns(kind, feats, labels, own.start)
    arguments = (loss, feats[own], labels[own], of_rank, columns)
    across = {"group": dist.group.WORLD, "exchange": exchange}
    got = _evaluate(*arguments, **options, **across)
    again = _evaluate(*arguments, **options, **across)
    name = f"{loss} {reduction} {kind} {exchange}"
    for first, second in zip(got, again, strict=True):
        assert torch.equal(first, second), f"{name}: not the same twice"
    exact = dtype == torch.float64
    allowed = (EXACT, EXACT) if exact else (SAME_LOSS, SAME_GRADIENT)
    want_loss = want[0][own] if reduction == "none" else want[0]
    check_same(f"{name}: loss", got[0], want_loss, allowed[0])
    check_same(f"{name}: feats", got[1], want[1][own], allowed[1])
    for k, (a, b) in enumerate(zip(got[2:], want[2:], strict=True)):
        check_same(f"{name}: gradient {k}", a, b * share, allowed[1])
    return got[0]


def _cases(*reductions: str) -> list[dict[str, str]]:
    return [
        {"loss": loss, "reduction": reduction, "columns": columns}
        for loss, reduction, columns in itertools.product(
            LOSSES, reductions, ("batch", "memory", "holding")
        )
    ]


def _small_tiles() -> None:
    patched_blocks(pytest.MonkeyPatch(), (7, 4))


def _all_cases(rank: int, counts: Sequence[int]) -> list[Tensor]:
    _small_tiles()
    return [
        _compare(rank, counts, case, exchange)
        for case in _cases("mean", "sum", "none")
        for exchange in ("gather", "ring")
        if case["reduction"] != "none" or case["columns"] == "batch" or exchange == "ring"
    ]


@pytest.mark.parametrize("counts", BATCHES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(counts: Sequence[int]) -> None:
    found = run_ranks(len(counts), _all_cases, counts)
    for losses in zip(*found, strict=True):
        if losses[0].dim() == 0:
            assert all(torch.equal(loss, losses[0]) for loss in losses)


def _oracle(rank: int, counts: Sequence[int]) -> None:
    for case in _cases("mean", "sum", "none"):
        _compare(rank, counts, case, "auto", torch.float64, "reference")


def test_reference_in_float64() -> None:
    run_ranks(3, _oracle, (5, 0, 9))


def _interpreted(rank: int, counts: Sequence[int]) -> None:
    """Blocks of equal size: none may pass for a tile that is its own mirror image."""
    for loss, exchange in (("uss", "gather"), ("pair_bce", "ring"), ("pair_softmax", "gather")):
        case = {"loss": loss, "reduction": "none", "columns": "batch"}
        _compare(rank, counts, case, exchange, backend="triton")


@pytest.mark.skipif(
    dispatch.unavailable("triton", "cpu", torch.float32) is not None,
    reason="Triton's interpreter is not in use",
)
def test_triton_in_its_interpreter() -> None:
    run_ranks(2, _interpreted, (4, 4))


# --- what else a call can be ----------------------------------------------------------------------


def _half_precision(rank: int, counts: Sequence[int]) -> None:
    """Upstream gradients that float16 would not hold: one scale for the weights of all ranks."""
    own = own_rows(counts, rank)
    for dtype, loss in itertools.product((torch.bfloat16, torch.float16), LOSSES):
        feats = normal(sum(counts), D, seed=1, dtype=dtype)
        labels = identities(sum(counts), seed=2)
        upstream = 2.0**10 * normal(sum(counts), seed=6)
        upstream[own if rank == 0 else slice(0, counts[0])] *= 2.0**-9
        want = _evaluate(loss, feats, labels, upstream, {}, reduction="none")
        for exchange in ("gather", "ring"):
            got = _evaluate(
                *(loss, feats[own], labels[own], upstream[own], {}),
                **{"reduction": "none", "group": dist.group.WORLD, "exchange": exchange},
            )
            allowed = conversion(dtype)
            check_same(f"{loss} {dtype}", got[1], want[1][own], allowed)


def _skipping(rank: int, counts: Sequence[int]) -> None:
    """Identities far apart: what is negligible is left out of the own batch, within the bound."""
    own, scale, tolerance = own_rows(counts, rank), 16.0, 5e-2
    labels = torch.arange(sum(counts)) % IDENTITIES
    feats = 2.0 * torch.eye(D)[labels] + 0.1 * normal(sum(counts), D, seed=1)
    found = []
    for skip in (0.0, tolerance):
        part = feats[own].clone().requires_grad_()
        value = uk.fused_uss_loss(
            *(part, labels[own], 7.0),
            scale=scale,
            skip_tolerance=skip,
            group=dist.group.WORLD,
            reduction="sum",
        )
        found.append((value.detach(), *torch.autograd.grad(value, part)))
    assert torch.equal(found[0][0], found[1][0])
    error = (found[0][1] - found[1][1]).norm(dim=1) * feats[own].norm(dim=1)
    assert bool((error <= len(counts) * scale * tolerance).all())
    assert bool(error.any()) == (own.start < own.stop)


def _once_and_again(rank: int, counts: Sequence[int]) -> None:
    """A retained graph, no graph, a second derivative, a group of some ranks."""
    own = own_rows(counts, rank)
    feats, labels = normal(sum(counts), D, seed=1), identities(sum(counts), seed=2)
    for loss in LOSSES:
        part = feats[own].clone().requires_grad_()
        arguments = {**_threshold(loss, torch.float32), "group": dist.group.WORLD}
        value = LOSSES[loss](part, labels[own], **arguments)
        first = torch.autograd.grad(value, part, retain_graph=True)[0]
        (second,) = torch.autograd.grad(value, part, create_graph=True)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="differentiable once"):
            second.sum().backward()
        with torch.no_grad():
            assert torch.equal(LOSSES[loss](part, labels[own], **arguments), value)
    outer = dist.new_group([0, 2])
    alone = dist.new_group([1])
    singles = [dist.new_group([k]) for k in range(len(counts))][rank]
    members = [own] if rank == 1 else [own_rows(counts, 0), own_rows(counts, 2)]
    batch = (torch.cat([t[m] for m in members]) for t in (feats, labels))
    got = uk.fused_uss_loss(feats[own], labels[own], 3.0, group=alone if rank == 1 else outer)
    check_same("a group of some ranks", got, uk.fused_uss_loss(*batch, 3.0), SAME_LOSS)
    memory, together = uk.FeatureMemory(IDENTITIES, D), uk.FeatureMemory(IDENTITIES, D)
    memory.update(feats[own], labels[own], group=alone if rank == 1 else outer)
    together.update(*(torch.cat([t[m] for m in members]) for t in (feats, labels)), group=singles)
    assert torch.equal(memory.features, together.features)
    for wrong in ("WORLD", outer if rank == 1 else alone):
        with pytest.raises(TypeError, match="group must be"):
            uk.fused_uss_loss(feats[own], labels[own], 3.0, group=wrong)


def _starts(rank: int, counts: Sequence[int]) -> None:
    """The first threshold is that of all batches, also on ranks without a pair of their own."""
    own = own_rows(counts, rank)
    feats = normal(sum(counts), D, seed=1)
    labels = torch.arange(sum(counts)) % IDENTITIES
    want = uk.uss_threshold_init(feats, labels)
    for module in (uk.USSLoss, uk.PairBCELoss):
        identities = {"num_identities": IDENTITIES} if module is uk.PairBCELoss else {}
        across = module(**identities, group=dist.group.WORLD)
        single = module(**identities)
        value = across(feats[own], labels[own])
        assert bool(across.initialized)
        check_same("threshold", across.threshold.detach(), want.expand_as(across.threshold), 1e-6)
        with torch.no_grad():
            single.threshold.copy_(across.threshold)
        check_same("loss", value, single.eval()(feats, labels), SAME_LOSS)
    across = uk.PairSoftmaxLoss(group=dist.group.WORLD, exchange="ring")
    want = uk.PairSoftmaxLoss()(feats, labels)
    for module in (across, copy.deepcopy(torch.nn.ModuleList([across]))[0]):
        check_same("loss", module(feats[own], labels[own]), want, SAME_LOSS)


def _various(rank: int, counts: Sequence[int]) -> None:
    _small_tiles()
    for check in (_half_precision, _skipping, _once_and_again, _starts):
        check(rank, counts)


def test_precision_skipping_graphs_groups_and_first_thresholds() -> None:
    run_ranks(3, _various, (16, 0, 9))


def _compiled(rank: int, counts: Sequence[int]) -> None:
    own = own_rows(counts, rank)
    feats, labels = normal(sum(counts), D, seed=1), identities(sum(counts), seed=2)
    module = uk.USSLoss(init_threshold=3.0, group=dist.group.WORLD)
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(feats[own], labels[own]), module(feats[own], labels[own]))


def test_torch_compile_breaks_the_graph() -> None:
    run_ranks(2, _compiled, (5, 3))


def _second_order(rank: int, counts: Sequence[int]) -> None:
    """A penalty of each rank's gradient, against that of one process."""
    own, size = own_rows(counts, rank), len(counts)
    every = normal(sum(counts), D, seed=1, dtype=torch.float64)
    labels = identities(sum(counts), seed=2)
    for loss, kind in itertools.product(LOSSES, ("batch", "holding")):
        found = []
        for rows, group, factor in ((slice(None), None, size), (own, dist.group.WORLD, 1)):
            feats = every[rows].clone().requires_grad_()
            columns = _columns(kind, every, labels, rows.start or 0)
            value = LOSSES[loss](
                *(feats, labels[rows]),
                **_threshold(loss, torch.float64),
                **columns,
                **_soft(loss, 4.0),
                backend="reference",
                group=group,
            )
            (first,) = torch.autograd.grad(factor * value, feats, create_graph=True)
            found += torch.autograd.grad(first.square().sum(), feats)
        assert bool(found[0].any())
        check_same(f"{loss} {kind}", found[1], found[0][own], EXACT)


def test_the_reference_has_second_derivatives_across_ranks() -> None:
    run_ranks(3, _second_order, (5, 0, 3))


# --- memory ---------------------------------------------------------------------------------------


def _held(rank: int, counts: Sequence[int], exchange: str) -> int:
    """Most remote rows held at a time, over forward and backward pass of every loss."""
    held: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def watched(allocate):
        def allocated(rows: Tensor, *arguments: Any) -> Tensor:
            found = allocate(rows, *arguments)
            tensor = found if isinstance(found, Tensor) else found()
            if rows.shape[1:] == (D,):
                held.append((StorageWeakRef(tensor.untyped_storage()), len(tensor)))
            nonlocal most
            most = max(most, sum(count for weak, count in held if not weak.expired()))
            return found if isinstance(found, Tensor) else lambda: tensor

        return allocated

    patch = pytest.MonkeyPatch()
    patch.setattr(exchanges, "slot", watched(exchanges.slot))
    patch.setattr(exchanges, "start_gather_rows", watched(exchanges.start_gather_rows))
    own = own_rows(counts, rank)
    feats, labels = normal(sum(counts), D, seed=1), identities(sum(counts), seed=2)
    for loss in LOSSES:
        _evaluate(
            *(loss, feats[own], labels[own], torch.tensor(1.0), {}),
            **{"group": dist.group.WORLD, "exchange": exchange},
        )
    patch.undo()
    return most


def test_a_ring_holds_one_batch_of_others() -> None:
    counts = (17, 3, 0, 9)
    assert run_ranks(4, _held, counts, "ring") == [18] * 4
    assert run_ranks(4, _held, counts, "gather") == [sum(counts)] * 4


def test_auto_gathers_what_is_small() -> None:
    feats = torch.empty(1, 512)
    counts = [exchanges.LARGEST_GATHER // (4 * 512), 0]
    assert not takes_ring("auto", counts, feats)
    assert takes_ring("auto", [*counts, 1], feats)
    assert not takes_ring("auto", [*counts, 1], feats.half())
    assert takes_ring("ring", counts, feats)
    assert not takes_ring("gather", [*counts, 1], feats)
