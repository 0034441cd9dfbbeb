"""The tile work of a formula, in operations of Torch.

Many passes over each tile, where a compiled kernel has one: several times slower, but with the same
drivers, so that no N x M matrix exists and gradients are those of the formula's derivatives.
"""

from __future__ import annotations

import functools
from functools import cached_property

import torch
from torch import Tensor

from ..reference import NORM_EPS
from ..streaming import (
    BothProducts,
    Call,
    CenterTiles,
    ClassSums,
    ClassTile,
    ClassWeights,
    DeviceFilter,
    Nearest,
    NegativeSums,
    PairSums,
    PairTile,
    PairWeights,
    PositiveSums,
    Reductions,
    SumTile,
    TileVariables,
    UnitRows,
    Variables,
    finish_rows,
    row_slopes,
)
from ..streaming.tiles import blocks
from .logits import chosen, fold, fold_both, logits_of, values_of
from .terms import Terms

#: Rows and columns of a tile. A dozen intermediate results of 1 MB stay near a core; launches on a
#: GPU need more work each, 16 MB.
BLOCK, CUDA_BLOCK = 512, 2048
#: Rows that are normalized at once, in float64.
ROWS = 4096


class EagerEngine(UnitRows, BothProducts, CenterTiles, Reductions):
    """See :class:`unitsface_kernels.backends.streaming.Engine`; GEMMs are in float32."""

    stat_dtype = torch.float64
    total_slots = 0
    keeps_cosines = True
    device_filter: DeviceFilter | None = None

    def __init__(self, call: Call) -> None:
        self._call, self.centers = call, call.centers

    @property
    def class_block(self) -> tuple[int, int]:
        return self.columns_per_tile(self.sum_block)

    @property
    def sum_block(self) -> tuple[int, int]:
        size = CUDA_BLOCK if self._call.rows.is_cuda else BLOCK
        return size, size

    @cached_property
    def _terms(self) -> Terms:
        """The formula of the loss; that of a ``nearest`` loss is evaluated by its driver."""
        formula = self._call.spec.formula
        assert formula is not None
        return Terms(formula, self._call.params)

    # --- rows -------------------------------------------------------------------------------------

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if column_labels is not None:
            return row_labels, column_labels
        # Classes are positions; a target in another shard (-2) is the position of none.
        count = self._call.num_columns
        elsewhere = torch.where(row_labels == -2, count, row_labels)
        return elsewhere, torch.arange(count, device=row_labels.device)

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        unit = source.new_empty((stop - start, source.shape[1]), dtype=torch.float32)
        inverse_norms = unit.new_empty(stop - start)
        for some in blocks(0, stop - start, ROWS):
            # Squares of float32 do not overflow in float64.
            rows = _rows(source, start, some, index).to(torch.float64)
            norms = torch.linalg.vector_norm(rows, dim=1)
            # NaN of a row with an element that is not finite.
            inverse = 1.0 / norms.clamp_min(NORM_EPS) + norms * 0.0
            inverse_norms[some] = inverse
            unit[some] = rows * inverse[:, None]
        return unit, inverse_norms

    def normalize_rows_backward(
        self,
        d_unit: Tensor,
        source: Tensor,
        start: int,
        inverse_norms: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        index: Tensor | None = None,
        raw: bool = False,
    ) -> None:
        assert not raw
        for some in blocks(0, len(d_unit), ROWS):
            inverse, gradient = inverse_norms[some, None], d_unit[some]
            unit = _rows(source, start, some, index).to(torch.float32) * inverse
            along = (gradient * unit).sum(dim=1, keepdim=True)
            # A clamped norm is a constant.
            along = torch.where(inverse >= 1.0 / NORM_EPS, 0.0, along)
            factor = inverse if scale is None else inverse * scale
            out[some] = factor * (gradient - along * unit)

    def cosines(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(a, b.T, out=out)

    def _workspace(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._call.rows.device)

    # --- sums -------------------------------------------------------------------------------------

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        gradient = self._sum_tile(tile, self._columns(tile))
        return None if gradient is None else self._of_vectors(gradient)

    def _sum_tile(self, tile: SumTile, cosine: Tensor) -> Tensor | None:
        (n, m), same = cosine.shape, _same(tile)
        valid = _valid(tile)
        per_column = self._call.spec.threshold == "per_column"

        def terms(threshold: Tensor, back: bool = False) -> list[Tensor]:
            values = values_of(tile.variables, back)
            found = self._terms.of_pairs(cosine, threshold, same, values)
            return [torch.where(valid, term, 0.0) for term in found]

        value, slope, by_threshold, *by_variables = terms(tile.b_threshold)
        a_weights = None if tile.a_weights is None else tile.a_weights[:, None]
        gradient = _times(slope, a_weights) if tile.gradient else None
        tile.a_loss += value.sum(dim=1)
        if tile.d_threshold is not None:
            sums = _times(by_threshold, a_weights)
            if per_column:
                tile.d_threshold[tile.b_start : tile.b_start + m] += sums.sum(dim=0)
            else:
                tile.d_threshold += sums.sum()
        if tile.d_variables is not None:
            _add_slopes(tile.d_variables, [_times(by, a_weights) for by in by_variables])
        if not tile.mirrored:
            return gradient
        # The pairs in the other direction: other thresholds and variables, another weight.
        if per_column or tile.variables is not None:
            threshold = tile.b_threshold
            if per_column:
                assert tile.a_threshold is not None
                threshold = tile.a_threshold[:, None]
            value, slope, by_threshold, *by_variables = terms(threshold, back=True)
        if gradient is not None:
            gradient = gradient + _times(slope, tile.b_weights)
        if tile.b_loss is None:
            return gradient
        tile.b_loss += value.sum(dim=0)
        if tile.d_threshold is not None:
            sums = _times(by_threshold, tile.b_weights)
            if per_column:
                tile.d_threshold[tile.a_start : tile.a_start + n] += sums.sum(dim=1)
            else:
                tile.d_threshold += sums.sum()
        if tile.d_variables is not None:
            slopes = [_times(by, tile.b_weights) for by in by_variables]
            _add_slopes(tile.d_variables, slopes, back=True)
        return gradient

    # --- log-sum-exp over classes -----------------------------------------------------------------

    def logsumexp_tile(self, tile: ClassTile, rows: ClassSums) -> None:
        cosine = self._columns(tile, tile.cosines)
        target = _Targets(tile, cosine)
        target.store_cosine(cosine, rows.target_cosine)
        logit = self._terms.negative(cosine, values_of(tile.variables)).value
        fold(NegativeSums(rows.maximum, rows.total), target.replaced(logit, -torch.inf), 1)

    def finish_rows(
        self, call: Call, sums: ClassSums, values: Variables | None = None
    ) -> tuple[Tensor, Tensor]:
        return finish_rows(call, sums, self._target_logits, values)

    row_slopes = staticmethod(row_slopes)

    def _target_logits(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        z = self._terms.positive(cosine)
        return z.value, z.slope

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        cosine = self._columns(tile) if tile.cosines is None else self._kept(tile.cosines)
        z = self._terms.negative(cosine, values_of(tile.variables))
        weight = rows.negative[:, None] * torch.exp(z.value - rows.log_negatives[:, None])
        target = _Targets(tile, cosine)
        if tile.d_variables is not None:
            scalars, of_rows, columns, *_ = tile.d_variables
            weights = target.replaced(weight, 0.0)
            totals = [*((total, 1) for total in (*scalars, *of_rows)), *((t, 0) for t in columns)]
            for (total, dim), by in zip(totals, z.by_variables, strict=True):
                total += (weights * by).sum(dim=dim)
        return self._of_vectors(target.replaced(weight * z.slope, rows.target))

    def nearest_tile(self, tile: ClassTile, rows: Nearest) -> None:
        cosine = self._columns(tile)
        target = _Targets(tile, cosine)
        target.store_cosine(cosine, rows.target_cosine)
        places = torch.arange(tile.start, tile.start + cosine.shape[1], device=cosine.device)
        cosines = torch.cat([rows.best, target.replaced(cosine, -torch.inf)], dim=1)
        places = target.replaced(places.to(torch.int32).expand_as(cosine), -1)
        # Stable: of equal cosines the earlier one. NaN comes before every number.
        best, order = cosines.sort(dim=1, descending=True, stable=True)
        count = rows.best.shape[1]
        rows.best.copy_(best[:, :count])
        positions = torch.cat([rows.position, places], dim=1)
        rows.position.copy_(positions.gather(1, order[:, :count]))

    # --- log-sum-exp over samples -----------------------------------------------------------------

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        cosine = tile.a @ tile.b.T
        logits = logits_of(self._terms.negative, cosine, tile, columns is not None)
        fold_both(rows, columns, logits, _valid(tile) & ~_same(tile))

    def pair_sums_tile(self, tile: PairTile, rows: PairSums, columns: PairSums | None) -> None:
        cosine, valid, same = tile.a @ tile.b.T, _valid(tile), _same(tile)
        both = columns is not None
        logits = logits_of(self._terms.negative, cosine, tile, both)
        fold_both(rows.negatives, columns and columns.negatives, logits, valid & ~same)
        if self._call.spec.positive is None:
            return
        logits = logits_of(self._terms.positive, cosine, tile, both)
        fold_both(rows.positives, columns and columns.positives, logits, valid & same)

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        positive = _valid(tile) & _same(tile)
        both = columns is not None
        logits = logits_of(self._terms.positive, tile.a @ tile.b.T, tile, both)
        for sums, z, dim in zip((rows, columns), logits, (1, 0), strict=False):
            assert sums is not None
            # Far above every log-sum-exp: both results are 0.
            gap = sums.log_negatives.unsqueeze(dim) - z.value
            gap = torch.where(positive, gap, -torch.inf)
            sums.loss.add_(-torch.nn.functional.logsigmoid(-gap).sum(dim=dim))
            sums.negative_prob.add_(torch.sigmoid(gap).sum(dim=dim))

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        cosine = tile.a @ tile.b.T
        same, valid, both = _same(tile), _valid(tile), columns is not None
        logits = logits_of(self._terms.negative, cosine, tile, both)
        if self._call.spec.positive is None:
            valid &= ~same
        else:
            own = logits_of(self._terms.positive, cosine, tile, both)
            logits = chosen(same, own, logits)
        shares = []
        for weights, z, dim in zip((rows, columns), logits, (1, 0), strict=False):
            assert weights is not None
            normalizer, negative, positive = (v.unsqueeze(dim) for v in weights[:3])
            of_negative = negative * torch.exp(z.value - normalizer)
            if weights.log_positives is None:
                of_positive = -positive * torch.sigmoid(normalizer - z.value)
            else:
                of_positive = positive * torch.exp(z.value - weights.log_positives.unsqueeze(dim))
            shares.append(torch.where(same, of_positive, of_negative))
            total = tile.d_variables
            if total is not None and (dim == 1 or total.b_rows is not None):
                slopes = [torch.where(valid, shares[-1] * by, 0.0) for by in z.by_variables]
                _add_slopes(total, slopes, back=dim == 0)
        if logits[0] is logits[-1]:
            gradient = functools.reduce(torch.add, shares) * logits[0].slope
        else:
            gradient = shares[0] * logits[0].slope + shares[1] * logits[1].slope
        return torch.where(valid, gradient, 0.0)

    # --- GEMMs of gradient tiles ------------------------------------------------------------------

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        total.addmm_(left, right)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        return tile.abs().sum(dim=dim)

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return tile[rows, columns]


def _rows(source: Tensor, start: int, some: slice, index: Tensor | None) -> Tensor:
    """Rows ``some`` of those from ``start``, of ``source`` or of ``source[index]``."""
    place = slice(start + some.start, start + some.stop)
    return source[place] if index is None else source[index[place]]


def _same(tile: SumTile | PairTile) -> Tensor:
    """(n, m) pairs of one identity."""
    return tile.a_labels[:, None] == tile.b_labels


def _valid(tile: SumTile | PairTile) -> Tensor:
    """(n, m) pairs that take part."""
    valid = (tile.a_labels >= 0)[:, None] & (tile.b_labels >= 0)
    if tile.diagonal is not None:
        places = torch.arange(max(valid.shape), device=valid.device)
        n, m = valid.shape
        valid &= places[:n, None] + tile.diagonal != places[:m]
    return valid


def _add_slopes(total: TileVariables, slopes: list[Tensor], back: bool = False) -> None:
    """Adds derivatives (n, m) of pairs to the gradients of the variables."""
    rows, columns, along = total.a_rows, total.b_columns, 1
    if back:
        assert total.b_rows is not None
        assert total.a_columns is not None
        rows, columns, along = total.b_rows, total.a_columns, 0
    remaining = iter(slopes)
    for sums, dim in ((total.scalars, (0, 1)), (rows, along), (columns, 1 - along)):
        for each in sums:
            each += next(remaining).sum(dim=dim)


def _times(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights


class _Targets:
    """Targets of a tile's rows, of which those in the tile count; nothing waits for the device."""

    def __init__(self, tile: ClassTile, cosine: Tensor) -> None:
        place, width = tile.targets - tile.start, cosine.shape[1]
        self._inside = (place >= 0) & (place < width) & (tile.targets >= 0)
        self._place = place.clamp(0, width - 1)[:, None]

    def store_cosine(self, cosine: Tensor, target_cosine: Tensor) -> None:
        own = cosine.gather(1, self._place)[:, 0]
        target_cosine.copy_(torch.where(self._inside, own, target_cosine))

    def replaced(self, tile: Tensor, by: Tensor | float) -> Tensor:
        """The (n, m) tile with other values (n,) or a number at the targets."""
        old = tile.gather(1, self._place)[:, 0]
        return tile.scatter(1, self._place, torch.where(self._inside, by, old)[:, None])
