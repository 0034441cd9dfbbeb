"""Variables of formulas across ranks, against one process that has all batches or classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.grid import extended_if
from support.helpers import patched_blocks
from support.ranks import IDENTITIES, identities, normal, own_rows, run_ranks
from support.tolerances import EXACT, SAME_GRADIENT, SAME_LOSS, check_same
from support.variables import (
    Balanced,
    Curricular,
    Distances,
    Everything,
    Margins,
    NormPairs,
    Norms,
    OneScalar,
    Scales,
    Shifts,
    Tempered,
    Triplets,
)
from torch import Tensor
from torch import distributed as dist

from unitsface_kernels import ClassLoss, PartialFC, dispatch, policy
from unitsface_kernels.functional.custom import fused_pair_loss
from unitsface_kernels.optim import SampledSGD

needs_native = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)


@dataclass
class _AcrossCase:
    of: type[policy.Pair]
    columns: str
    reduction: str
    backend: str
    dtype: torch.dtype

    def evaluate(
        self,
        rows: slice,
        whole: dict[str, Tensor],
        own: set[str],
        samples: tuple[Tensor, Tensor],
        upstream: Tensor,
        **across: Any,
    ) -> list[Tensor]:
        """Loss and gradients of some rows; ``own``: variables that are theirs alone."""
        leaves = {"feats": samples[0][rows].clone().requires_grad_()}
        for name, value in whole.items():
            leaves[name] = (value[rows] if name in own else value).clone().requires_grad_()
        given: dict[str, Any] = {name: leaves[name] for name in whole}
        if self.columns == "memory":
            given["memory"] = normal(13, 11, seed=3, dtype=self.dtype)
            given["memory_labels"] = identities(13, seed=4)
        if self.of.formula.threshold:
            given["b"] = torch.tensor(0.5)
        options = {"backend": self.backend, "reduction": self.reduction, **across}
        loss = fused_pair_loss(self.of(), leaves["feats"], samples[1][rows], **given, **options)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream)]

    def check(self, rank: int, counts: Sequence[int], exchange: str) -> None:
        rows, total, in_batch = own_rows(counts, rank), sum(counts), self.columns == "batch"
        samples = normal(total, 11, seed=1, dtype=self.dtype), identities(total, seed=2)
        wide = torch.promote_types(self.dtype, torch.float32)
        columns = total if in_batch else 13
        sizes = {"scalar": 1, "row": total, "column": columns, "identity": IDENTITIES}
        kinds = {v.name: v.kind for v in self.of.formula.variables if v.given}
        whole = {
            name: 0.5 + normal(sizes[kind], seed=7, dtype=wide).abs()
            for name, kind in kinds.items()
        }
        own = {name for name, k in kinds.items() if k == "row" or (k == "column" and in_batch)}
        upstream, of_all = torch.tensor(1.7, dtype=wide), torch.tensor(1.7, dtype=wide)
        if self.reduction == "none":
            of_all = normal(total, seed=6, dtype=wide)
            upstream = of_all[rows]
        else:
            of_all = of_all * len(counts)
        want_loss, *want = self.evaluate(slice(None), whole, own, samples, of_all)
        across = {"group": dist.group.WORLD, "exchange": exchange}
        loss, *got = self.evaluate(rows, whole, own, samples, upstream, **across)
        allowed = (SAME_LOSS, SAME_GRADIENT)
        if self.dtype == torch.float64:
            allowed = (EXACT, EXACT)
        if self.reduction == "none":
            want_loss = want_loss[rows]
        check_same(f"{self}: loss", loss, want_loss, allowed[0])
        for name, a, b in zip(("feats", *whole), got, want, strict=True):
            # What only one rank has gets W times the objective: data parallelism averages it.
            b = b[rows] if name == "feats" or name in own else b / len(counts)
            check_same(f"{self}: {name}", a, b, allowed[1])


SUMS = (Everything, NormPairs, Distances)
LOGSUMEXPS = (Tempered, Scales, Balanced)


def _across(
    rank: int,
    counts: Sequence[int],
    policies: Sequence[type[policy.Pair]],
    backend: str,
    dtype: torch.dtype,
) -> None:
    """Against one process that has all batches."""
    patched_blocks(pytest.MonkeyPatch(), (7, 4))
    for case in itertools.product(policies, ("batch", "memory"), ("mean", "none")):
        for exchange in ("gather", "ring"):
            _AcrossCase(*case, backend, dtype).check(rank, counts, exchange)


@pytest.mark.parametrize(
    ("counts", "policies"),
    [
        pytest.param((5, 0, 23), SUMS, id="sums, a rank without rows"),
        pytest.param((19, 4), LOGSUMEXPS[:2], id="log-sum-exps", marks=extended_if(True)),
        pytest.param(
            *((5, 0, 23), LOGSUMEXPS),
            id="log-sum-exps, a rank without rows",
            marks=extended_if(True),
        ),
    ],
)
@needs_native
def test_across_ranks(counts: Sequence[int], policies: Sequence[type[policy.Pair]]) -> None:
    run_ranks(len(counts), _across, counts, policies, "native", torch.float32)


@pytest.mark.extended
@pytest.mark.skipif(
    dispatch.unavailable("triton", "cpu", torch.float32) is not None,
    reason="needs Triton's interpreter",
)
@pytest.mark.parametrize("policies", [SUMS, LOGSUMEXPS[:2]], ids=["sums", "log-sum-exps"])
def test_across_ranks_by_triton(policies: Sequence[type[policy.Pair]]) -> None:
    run_ranks(2, _across, (9, 4), policies, "triton", torch.float32)


@pytest.mark.parametrize(
    "policies",
    [SUMS, pytest.param(LOGSUMEXPS, marks=extended_if(True))],
    ids=["sums", "log-sum-exps"],
)
def test_across_ranks_by_the_reference(policies: Sequence[type[policy.Pair]]) -> None:
    run_ranks(2, _across, (9, 4), policies, "reference", torch.float64)


def _sharded(rank: int, counts: Sequence[int], policies: Sequence[type[policy.Class]]) -> None:
    """Against one process with all classes; the upstream gradient is the same on every rank."""
    size, own, total = len(counts), own_rows(counts, rank), sum(counts)
    feats = normal(total, 11, seed=1)
    labels = torch.randint(-1, 17, (total,), generator=torch.Generator().manual_seed(2))
    for of, when in itertools.product(policies, (None, "backward")):
        kinds = {v.name: v.kind for v in of.formula.variables if v.given}
        kept = {
            name: 0.6 if kind == "scalar" else 0.5 + normal(17, seed=8).abs()
            for name, kind in kinds.items()
            if kind != "row"
        }
        whole = ClassLoss(of(), 11, 17, backend="native", **kept)
        shard = PartialFC(of(), 11, 17, backend="native", **kept)
        with torch.no_grad():
            whole.weight.copy_(normal(17, 11, seed=3))
            shard.weight.copy_(whole.weight[shard.shard.start : shard.shard.stop])
        if when is not None:
            shard.fuse(SampledSGD(shard.parameters(), lr=0.5), when)
        rows = {n: 0.3 + normal(total, seed=9).abs() for n, kind in kinds.items() if kind == "row"}
        results = []
        for module, some in ((whole, slice(None)), (shard, own)):
            leaves = {"feats": feats[some].clone().requires_grad_()}
            leaves |= {name: value[some].clone().requires_grad_() for name, value in rows.items()}
            given = {name: leaves[name] for name in rows}
            loss = module(leaves["feats"], labels[some], **given)
            loss.backward()
            results.append((loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
        (want_loss, want), (loss, got) = results
        name = f"{of.__name__} {when}"
        check_same(f"{name}: loss", loss, want_loss, SAME_LOSS)
        for each, gradient in got.items():
            check_same(f"{name}: {each}", gradient, want[each][own] * size, SAME_GRADIENT)
        classes = slice(shard.shard.start, shard.shard.stop)
        kept_of = dict(shard.loss.named_parameters())
        for each, parameter in whole.named_parameters():
            mine, gradient = kept_of[each], parameter.grad
            if each == "weight" and when is not None:
                moved = parameter.detach() - 0.5 * gradient
                check_same(f"{name}: {each}", mine.detach(), moved[classes], SAME_GRADIENT)
                continue
            gradient = gradient[classes] if gradient.dim() else gradient
            check_same(f"{name}: {each}", mine.grad.to_dense(), gradient, SAME_GRADIENT)


@needs_native
@pytest.mark.parametrize(
    "policies",
    [
        (OneScalar, Norms, Margins, Curricular),
        pytest.param((Shifts, Triplets), marks=extended_if(True)),
    ],
    ids=["targets", "negatives"],
)
@pytest.mark.parametrize("counts", [(7,), (9, 0, 4)], ids=str)
def test_sharded_classes(counts: Sequence[int], policies: Sequence[type[policy.Class]]) -> None:
    run_ranks(len(counts), _sharded, counts, policies)


class _PerKind(policy.Pair):
    of_identity: policy.PerIdentity
    scalar: policy.Scalar
    of_row: policy.PerRow

    def positive(self, c):
        return self.scalar * self.of_row * (1 - c)

    def negative(self, c):
        return policy.maximum(c - self.of_identity, 0)


class _RowMargin(policy.Class):
    combine = "logsumexp"
    margin: policy.PerRow

    def positive(self, c):
        return 8 * (c - self.margin)

    def negative(self, c):
        return 8 * c


def _numbers(rank: int) -> list[float]:
    feats, labels = normal(5 + rank, 4, seed=rank), identities(5 + rank, seed=rank)
    found = []
    for of_identity in (0.3, torch.full((IDENTITIES,), 0.3)):
        loss = fused_pair_loss(
            _PerKind(),
            feats,
            labels,
            of_identity=of_identity,
            scalar=1.5,
            of_row=feats[:, 0],
            group=dist.group.WORLD,
            backend="native",
        )
        found.append(float(loss))
    return found


@needs_native
def test_a_number_is_the_same_for_every_identity() -> None:
    for number, tensor in run_ranks(2, _numbers):
        assert number == tensor


def _differing(rank: int) -> list[str]:
    feats, labels = normal(6, 4, seed=1), identities(6, seed=2)
    given: dict[str, Any] = {"of_identity": 0.3, "group": dist.group.WORLD, "backend": "native"}
    found = []
    for scalar, learned in ((1.0 + rank, False), (torch.tensor(1.0).requires_grad_(), rank == 0)):
        of_row = feats[:, 0].clone().requires_grad_(learned)
        with pytest.raises(ValueError, match="must be the same on every rank") as error:
            fused_pair_loss(_PerKind(), feats, labels, scalar=scalar, of_row=of_row, **given)
        found.append(str(error.value))
    of_row = feats[:, 0].clone().requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=r"gradients of variables .* \['margin'\] on rank 0, \[\]"):
        PartialFC(_RowMargin(), 4, 17, backend="native")(feats, labels, margin=of_row)
    return found


@needs_native
def test_ranks_with_different_variables_are_an_error() -> None:
    for numbers, gradients in run_ranks(2, _differing):
        assert "scalar must be the same" in numbers
        assert "1.0 on rank 0, 2.0 on rank 1" in numbers
        assert "['scalar', 'of_row'] on rank 0, ['scalar'] on rank 1" in gradients
