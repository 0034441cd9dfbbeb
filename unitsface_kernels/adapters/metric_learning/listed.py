"""Losses of listed pairs, whose number the list alone bounds; similarities come from tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch, policy
from ...backends.reference import normalize_rows, norms
from ...losses import EMPTY, LossSpec
from ...losses.custom import spec as spec_of
from ...losses.spec import EagerTerm
from ...policy.variable import COLUMN_NORM, ROW_NORM
from .base import wide
from .indices import Pairs

#: Elements of a tile of similarities.
_TILE = 2**22


@dataclass(frozen=True)
class Listed:
    """Pairs of rows and columns.

    Attributes:
        rows, columns: (N, D), (M, D) embeddings.
        pairs: the list.
        backend: of the loss; "reference" makes everything differentiable any number of times.
    """

    rows: Tensor
    columns: Tensor
    pairs: Pairs
    backend: str

    @property
    def plain(self) -> bool:
        return dispatch.resolve(self.backend, self.rows.device, self.rows.dtype) == "reference"

    @property
    def distinct(self) -> Listed:
        """Every pair once, and none of both kinds."""
        count = max(len(self.columns), 1)
        positive = torch.unique(self.pairs.anchors * count + self.pairs.positives)
        negative = torch.unique(self.pairs.others * count + self.pairs.negatives)
        places = [part for key in (positive, negative) for part in (key // count, key % count)]
        return Listed(self.rows, self.columns, Pairs(*places), self.backend)

    def without_both_kinds(self) -> Listed:
        """Negatives that are not positives, too."""
        count = max(len(self.columns), 1)
        anchors, positives, others, negatives = self.pairs
        kept = ~torch.isin(others * count + negatives, anchors * count + positives)
        pairs = Pairs(anchors, positives, others[kept], negatives[kept])
        return Listed(self.rows, self.columns, pairs, self.backend)

    def terms(self, of: policy.Pair, **given: Tensor) -> list[Tensor | None]:
        """The formula's terms of the positive and of the negative pairs.

        ``given``: variables, as functions take them.
        """
        spec = spec_of(of)
        anchors, positives, others, negatives = self.pairs
        with torch.autocast(self.rows.device.type, enabled=False):
            rows, columns = self.rows.to(wide(self.rows)), self.columns.to(wide(self.rows))
            sizes = {**given, ROW_NORM: norms(rows), COLUMN_NORM: norms(columns)}
            operands = _operand(spec, rows), _operand(spec, columns)

            def value(term: EagerTerm | None, a: Tensor, b: Tensor) -> Tensor | None:
                if term is None:
                    return None
                values = [_of_pairs(sizes[v.name].to(rows), v.side, a, b) for v in spec.variables]
                compared = _products(*operands, a, b, self.plain)
                more = (tuple(values),) if values else ()
                return term(compared, None, spec.pack(of.values()), *more)

            own = value(spec.positive, anchors, positives)
            return [own, value(spec.negative, others, negatives)]

    def rows_of(self, of: policy.Pair, **given: Tensor) -> Tensor:
        """(N,) losses of the rows, of a formula that combines by "logsumexps" or "sum"."""
        spec = spec_of(of)
        terms = self.terms(of, **given)
        anchors, others = self.pairs.anchors, self.pairs.others
        if spec.finish is None:
            sums = [
                self.sums(each, of_row)
                for each, of_row in zip(terms, (anchors, others), strict=True)
                if each is not None
            ]
            return sum(sums[1:], sums[0])
        own, other = terms
        assert own is not None
        assert other is not None
        of_sides = [self.log_sums(own, anchors), self.log_sums(other, others)]
        given = {**given, ROW_NORM: norms(self.rows.to(own.dtype))}
        of_rows = [given[v.name].to(own.dtype) for v in spec.variables if v.side != "column"]
        return spec.finish.value(*of_sides, spec.pack(of.values()), of_rows)

    def sums(self, values: Tensor, of_row: Tensor) -> Tensor:
        """(N,) sums of (P,) values over the pairs of a row, in the order of the list."""
        return _sums(values, of_row, len(self.rows), self.plain)

    def counts(self, of_row: Tensor) -> Tensor:
        """(N,) numbers of pairs."""
        return torch.bincount(of_row, minlength=len(self.rows))

    def log_sums(self, logits: Tensor, of_row: Tensor) -> Tensor:
        """(N,) log-sum-exps over the pairs of a row; of none ``EMPTY``."""
        least = torch.full((len(self.rows),), EMPTY, dtype=logits.dtype, device=logits.device)
        largest = least.scatter_reduce(0, of_row, logits.detach(), "amax")
        # 0 without pairs, or with only pairs that formulas leave out: nothing overflows.
        shift = torch.where(largest > EMPTY, largest, 0.0)
        total = self.sums(torch.exp(logits - shift[of_row]), of_row)
        some = total > 0
        logarithm = torch.log(torch.where(some, total, 1.0)) + shift
        # NaN is in no comparison.
        return torch.where(total == 0, EMPTY, torch.where(some, logarithm, torch.nan))


def _operand(spec: LossSpec, rows: Tensor) -> Tensor:
    return normalize_rows(rows) if spec.normalize else rows


def _of_pairs(value: Tensor, side: str, a: Tensor, b: Tensor) -> Tensor:
    if side == "scalar" or value.numel() == 1:
        return value.reshape(())
    return value[a] if side == "row" else value[b]


def _products(x: Tensor, y: Tensor, a: Tensor, b: Tensor, plain: bool) -> Tensor:
    """(P,) inner products of rows a of x and b of y."""
    if plain:
        return (x @ y.T)[a, b]
    return _Products.apply(x, y, a, b)


class _Products(torch.autograd.Function):
    """A block of rows against all columns at a time: the work of a matmul, the memory of a tile.

    Gradients are added in the order of the list, on every device.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, a, b)
        found = x.new_empty(len(a))
        for rows, listed in _blocks(a, len(x), len(y)):
            tile = x[rows] @ y.T
            found[listed] = tile[a[listed] - rows.start, b[listed]]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, y, a, b = ctx.saved_tensors
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
        for rows, listed in _blocks(a, len(x), len(y)):
            block = x[rows]
            tile = x.new_zeros(len(block), len(y))
            places = a[listed] - rows.start, b[listed]
            tile.index_put_(places, gradient[listed], accumulate=True)
            of_x[rows] = tile @ y
            of_y += tile.T @ block
        return of_x, of_y, None, None


def _blocks(a: Tensor, rows: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows that have pairs, with the places of these in the list."""
    size = max(1, _TILE // max(columns, 1))
    ordered, order = a.sort(stable=True)
    starts = list(range(0, rows, size))
    ends = torch.tensor([*starts[1:], rows], device=a.device)
    first = 0
    for start, last in zip(starts, torch.searchsorted(ordered, ends).tolist(), strict=True):
        if last > first:
            yield slice(start, min(start + size, rows)), order[first:last]
        first = last


def _sums(values: Tensor, of_row: Tensor, rows: int, plain: bool) -> Tensor:
    if plain:
        return values.new_zeros(rows).index_add(0, of_row, values)
    if not len(values):
        return values.new_zeros(rows) + values.sum()
    ordered, order = of_row.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(rows, device=values.device))
    return F.embedding_bag(order, values[:, None], offsets, mode="sum")[:, 0]
