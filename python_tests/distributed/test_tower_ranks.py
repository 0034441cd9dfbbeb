"""Losses between two towers of all ranks, against one process that has all of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.helpers import patched_blocks
from support.ranks import identities, normal, own_rows, run_ranks
from support.tolerances import EXACT, SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor
from torch import distributed as dist

import unitsface_kernels as uk
from unitsface_kernels.adapters.open_clip import ClipLoss, SigLipLoss
from unitsface_kernels.adapters.sentence_transformers import MultipleNegativesRankingLoss
from unitsface_kernels.distributed import pairs
from unitsface_kernels.functional import tower_ranks

D, EXTRA = 11, 2
Loss = Callable[..., Tensor]


def _clip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, **options) -> Tensor:
    return uk.fused_clip_loss(a, b, scale, **options)


def _info_nce(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, **options) -> Tensor:
    return uk.fused_info_nce_loss(a, b, scale=scale, **options)


def _losses(rows: slice, keys: Tensor, count: int) -> dict[str, tuple[Loss, bool]]:
    """Losses, and whether their second tower has further keys; of ``rows``, and ``keys``."""
    found: dict[str, tuple[Loss, bool]] = {
        "siglip": (uk.fused_siglip_loss, False),
        "clip": (_clip, False),
    }
    labels, key_labels = identities(count, seed=2), identities(2 * count + 9, seed=3)
    by_label = {"labels": labels[rows], "key_labels": key_labels[keys]}
    by_place = {"labels": None, "key_labels": None}
    for both, labeled in itertools.product((False, True), (by_place, by_label)):
        name = f"info_nce both={both} labels={labeled is by_label}"
        found[name] = (partial(_info_nce, both=both, **labeled), True)
    return found


def _evaluate(loss: Loss, towers: Sequence[Tensor], upstream: Tensor, **options) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in towers]
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    leaves += [torch.tensor(v, dtype=wide, requires_grad=True) for v in (7.0, -3.0)]
    value = loss(*leaves, **options)
    found = torch.autograd.grad(value, leaves, upstream.expand_as(value), allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in found)]


def _compare(
    rank: int, counts: Sequence[int], exchange: str, backend: str, dtype: torch.dtype
) -> None:
    size, rows, count = len(counts), own_rows(counts, rank), sum(counts)
    everything = torch.arange(count + EXTRA * size)
    # Matching keys first, in one process as on every rank; then those that match none.
    further = torch.arange(count + EXTRA * rank, count + EXTRA * (rank + 1))
    keys = torch.cat([torch.arange(rows.start, rows.stop), further])
    a, b = normal(count, D, seed=1, dtype=dtype), normal(len(everything), D, seed=4, dtype=dtype)
    b[:count] += a
    of_one, of_rank = _losses(slice(0, count), everything, count), _losses(rows, keys, count)
    exact = dtype == torch.float64
    allowed = (EXACT, EXACT) if exact else (SAME_LOSS, SAME_GRADIENT)
    for name, reduction in itertools.product(of_one, ("mean", "sum", "none")):
        loss, more = of_one[name]
        accuracy = torch.promote_types(dtype, torch.float32)
        # Not the same on every rank: the objective is the mean of what ranks make of the loss.
        own = torch.tensor(1.0 if reduction == "none" else 1.0 + rank, dtype=accuracy)
        all_of_them = own if reduction == "none" else own.new_tensor(size * (size + 1) / 2)
        wide = (a, b) if more else (a, b[:count])
        want = _evaluate(loss, wide, all_of_them, reduction=reduction, backend=backend)
        held = keys if more else keys[: len(keys) - EXTRA]
        options = {"reduction": reduction, "backend": backend}
        across = {"group": dist.group.WORLD, "exchange": exchange}
        got = _evaluate(of_rank[name][0], (a[rows], b[held]), own, **options, **across)
        text = f"{name} {reduction} {exchange}"
        if reduction == "none":
            places = torch.arange(count)[rows]
            if len(want[0]) > count:
                places = torch.cat([places, count + held])
            want[0] = want[0][places]
        check_same(f"{text}: loss", got[0], want[0], allowed[0])
        check_same(f"{text}: rows", got[1], want[1][rows], allowed[1])
        check_same(f"{text}: keys", got[2], want[2][held], allowed[1])
        check_same(f"{text}: scale", got[3], want[3] / size, 4 * allowed[1])
        check_same(f"{text}: bias", got[4], want[4] / size, allowed[1])


def _all(rank: int, counts: Sequence[int], exchanges: Sequence[str], backend: str) -> None:
    patched_blocks(pytest.MonkeyPatch(), (7, 4))
    dtype = torch.float64 if backend == "reference" else torch.float32
    for exchange in exchanges:
        _compare(rank, counts, exchange, backend, dtype)


@pytest.mark.parametrize(
    "counts",
    [(5, 0, 13), *(pytest.param(c, marks=pytest.mark.extended) for c in ((6,), (0, 0), (9, 9)))],
    ids=str,
)
def test_losses_and_gradients_are_those_of_one_process(counts: Sequence[int]) -> None:
    run_ranks(len(counts), _all, counts, ("gather", "ring"), "native")


def test_reference_in_float64() -> None:
    run_ranks(2, _all, (5, 3), ("auto", "ring"), "reference")


def _bounded_memory(rank: int, counts: Sequence[int]) -> int:
    """Bytes of the largest exchange of a step in a ring; features are never gathered."""
    rows, count, largest = own_rows(counts, rank), sum(counts), [0]
    patch = pytest.MonkeyPatch()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, counts: Sequence[int], group: Any = None) -> Any:
            assert tensor.dim() == 1 or tensor.shape[1] != D
            return function(tensor, counts, group)

        return call

    def slot(rows: Tensor, count: int) -> Tensor:
        largest[0] = max(largest[0], count)
        return rows.new_empty((count, rows.shape[1]))

    for module in (pairs.eager, pairs.exchange, tower_ranks):
        for name in ("start_gather_rows", "start_scatter_sums"):
            if hasattr(module, name):
                patch.setattr(module, name, counted(getattr(module, name)))
    patch.setattr(pairs.exchange, "slot", slot)
    towers = [normal(count, D, seed=k)[rows].requires_grad_() for k in (1, 4)]
    labels = [identities(count, seed=k)[rows] for k in (2, 3)]
    options = {"both": True, "group": dist.group.WORLD, "exchange": "ring"}
    uk.fused_info_nce_loss(*towers, *labels, 7.0, **options).backward()
    patch.undo()
    return largest[0]


def test_a_ring_holds_half_a_batch_of_others() -> None:
    counts = (5, 12, 8)
    assert run_ranks(len(counts), _bounded_memory, counts) == [6, 6, 6]


class _Model(torch.nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


def _drop_ins(rank: int, counts: Sequence[int]) -> None:
    """The gradients that averaging over ranks takes to those of one process, or to a part."""
    size, rows, count = len(counts), own_rows(counts, rank), sum(counts)
    a, b, negatives = (normal(count, D, seed=k) for k in (1, 2, 3))
    ranks = {"rank": rank, "world_size": size}

    def clip(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return uk.fused_clip_loss(x, y, 6.0)

    def siglip(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return uk.fused_siglip_loss(x, y, 6.0, -2.0)

    def ranking(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return uk.fused_info_nce_loss(x, torch.cat([y, z]), None, None, 20.0)

    module = MultipleNegativesRankingLoss(_Model(), gather_across_devices=True)
    cases: list[tuple[Loss, Loss, float]] = [
        (clip, lambda x, y, z: ClipLoss(True, True, **ranks)(x, y, 6.0), size),
        (clip, lambda x, y, z: ClipLoss(gather_with_grad=True, **ranks)(x, y, 6.0), size),
        (clip, lambda x, y, z: ClipLoss(**ranks)(x, y, 6.0), 1.0),
        (siglip, lambda x, y, z: SigLipLoss(dist_impl="shift", **ranks)(x, y, 6.0, -2.0), size),
        (ranking, lambda *columns: module([{"x": x} for x in columns], None), size),
    ]
    for number, (one, across, factor) in enumerate(cases):
        leaves = [t.clone().requires_grad_() for t in (a, b, negatives)]
        want = one(*leaves)
        want.backward()
        own = [t[rows].clone().requires_grad_() for t in (a, b, negatives)]
        got = across(*own)
        got.backward()
        check_same(f"case {number}: loss", got.detach(), want.detach(), SAME_LOSS)
        for part, whole in zip(own, leaves, strict=True):
            if whole.grad is not None:
                wanted = whole.grad[rows] * factor
                check_same(f"case {number}: gradient", part.grad, wanted, SAME_GRADIENT)


def test_drop_ins_have_the_gradients_of_the_originals() -> None:
    run_ranks(2, _drop_ins, (4, 4))


def _differ(rank: int) -> None:
    """What decides which collectives follow, which would hang otherwise."""
    x, labels = normal(4, D, seed=rank), torch.arange(4)
    whole: dict[str, object] = {"labels": labels, "key_labels": labels, "group": dist.group.WORLD}
    other: list[tuple[dict[str, object], str]] = [
        ({"reduction": "sum"}, "reduction must be the same on every rank"),
        ({"both": True}, "both must be the same on every rank"),
        ({"labels": None, "key_labels": None}, "whether there are labels must be the same"),
        ({"batch_offset": 0}, "batch_offset must be None with a group"),
    ]
    for options, message in other:
        with pytest.raises(ValueError, match=message):
            uk.fused_info_nce_loss(x, x, scale=9.0, **{**whole, **(options if rank else {})})


def test_ranks_that_differ_are_an_error_on_all() -> None:
    run_ranks(2, _differ)


def _compiled(rank: int) -> None:
    """Values are checked: ranks agree outside of the graph."""
    x, labels = normal(4, D, seed=rank), torch.arange(4)

    @torch.compile(backend="eager")
    def loss(labels: Tensor) -> Tensor:
        return uk.fused_info_nce_loss(x, x, labels, labels, 9.0, group=dist.group.WORLD)

    assert loss(labels).isfinite()
    with pytest.raises(ValueError, match="labels must be in"):
        loss(labels - 2)


@pytest.mark.extended
def test_ranks_agree_outside_of_a_compiled_graph() -> None:
    run_ranks(2, _compiled)
