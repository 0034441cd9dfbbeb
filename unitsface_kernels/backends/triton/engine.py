"""The tile work of the Triton backend."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ..streaming import (
    BothProducts,
    Call,
    ClassSums,
    ClassTile,
    ClassWeights,
    Nearest,
    NegativeSums,
    PairSums,
    PairTile,
    PairWeights,
    PositiveSums,
    SumTile,
    TargetWeights,
    Variables,
    finish_rows,
    row_slopes,
)
from . import (
    centers_tile,
    configs,
    launch,
    logsumexp_pairs_tile,
    logsumexp_tile,
    nearest_tile,
    row_formulas,
    sum_tile,
    sum_variables_tile,
)
from .filtered_matmul import TritonFilter
from .kernels import rows
from .matmul import addmm, matmul
from .reductions import TritonReductions
from .row_kernels import RowKernels
from .workspace import DEPTH_MULTIPLE, STRIDE_MULTIPLE, Workspace, padded, shipped_config

#: Rows and columns of a tile, where there are several: whole blocks of the kernels.
BLOCK_MULTIPLE = 128


def _floor(size: int, multiple: int) -> int:
    return max(size // multiple, 1) * multiple


def _even(count: int, largest: int) -> int:
    """Size of the fewest blocks that ``count`` takes, all alike: small GEMMs fill no GPU."""
    parts = max(-(-count // largest), 1)
    return min(padded(max(-(-count // parts), 1), BLOCK_MULTIPLE), largest)


class TritonEngine(RowKernels, BothProducts, TritonReductions):
    """Engine of one call; see the protocol ``streaming.engine.Engine``.

    Args:
        call: the call.
        gradients: whether the pass has tiles of gradients; without, tiles are as large as
            their partial results allow, so that one launch does as much as possible.
        capability: compute capability to configure for; None: of the call's device.
        config: launches; None: those shipped for the capability.
    """

    stat_dtype = torch.float32
    # Cosines never leave the chip here, and the memory they would go to is slower than the GEMM.
    keeps_cosines = False

    def __init__(
        self,
        call: Call,
        gradients: bool = True,
        capability: int | None = None,
        config: configs.Config | None = None,
    ) -> None:
        self._call = call
        self._gradients = gradients
        self._space = Workspace(call, config or shipped_config(call, capability))
        self._wave = self._space.config.wave
        self.device_filter = TritonFilter(self._space)

    @cached_property
    def sum_block(self) -> tuple[int, int]:
        wave = self._wave
        largest = wave.gradient_rows if self._gradients else wave.rows
        two, config = self._call.spec.reduction == "logsumexps", self._space.config
        side = math.isqrt(self._pairs(config.pair_sums if two else config.sum))
        block = _even(self._call.rows.shape[0], min(largest, _floor(side, STRIDE_MULTIPLE)))
        return block, block

    @cached_property
    def class_block(self) -> tuple[int, int]:
        call, wave = self._call, self._wave
        size = call.compute_dtype.itemsize
        count, width = call.rows.shape
        columns = min(wave.columns, wave.unit_bytes // (padded(width, DEPTH_MULTIPLE) * size))
        height = _even(count, wave.gradient_rows if self._gradients else wave.rows)
        columns = min(columns, self._pairs(self._space.config.statistics) // height)
        return height, _even(call.num_columns, _floor(columns // call.centers, STRIDE_MULTIPLE))

    @property
    def total_slots(self) -> int:
        spec, config = self._call.spec, self._space.config
        most = sum_tile.most_programs(spec, config, self.sum_block)
        # Without columns or other ranks no tile is one of these.
        if self._call.columns is not None or self._call.ranks is not None:
            most = max(most, sum_tile.most_programs(spec, config, self.class_block))
        # Kernels want both kinds of parts aligned, which lie one after the other.
        return padded(most, 4)

    def _pairs(self, tile: configs.TileConfig) -> int:
        """Most pairs of a tile, whose gradients or partial results have to fit the workspace."""
        size = self._wave.gradient_bytes
        if self._gradients:
            return size // self._call.compute_dtype.itemsize
        # Float32 per row and subtile: two, or two of each kind of pairs.
        numbers = 4 if self._call.spec.reduction == "logsumexps" else 2
        return size // (4 * numbers) * (tile.block_n // tile.epilogue_subtiles)

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if column_labels is None:
            # Classes: identities are positions. A target elsewhere is a row of negatives only.
            count = self._call.num_columns
            columns = torch.arange(count, dtype=torch.int32, device=row_labels.device)
            return torch.where(row_labels == -2, count, row_labels).to(torch.int32), columns
        both = [row_labels] if column_labels is row_labels else [row_labels, column_labels]
        count = sum([labels.shape[0] for labels in both])
        slots = 1 << max(2 * count - 1, 1).bit_length()
        # The last one stands in where nothing is looked up.
        table = self._space.empty(slots + 1, torch.int64).fill_(-1)
        narrow = [self._narrow(labels, table) for labels in both]
        return narrow[0], narrow[-1]

    def _narrow(self, labels: Tensor, table: Tensor) -> Tensor:
        out = self._space.empty(labels.shape[0], torch.int32)
        config = configs.VECTOR
        launch.run(
            rows.narrow_labels_kernel,
            -(-labels.shape[0] // config.block),
            labels,
            labels.shape[0],
            table,
            table.shape[0] - 1,
            out,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        return out

    # Tiles

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        kind = sum_tile if tile.variables is None else sum_variables_tile
        gradient = kind.run(self._space, centers_tile.reduced(self._space, tile))
        return None if gradient is None else centers_tile.spread(self._space, gradient)

    def logsumexp_tile(self, tile: ClassTile, rows: ClassSums) -> None:
        assert tile.cosines is None
        tile = centers_tile.reduced(self._space, tile)
        logsumexp_tile.statistics(self._space, tile, rows)

    def finish_rows(
        self, call: Call, sums: ClassSums, values: Variables | None = None
    ) -> tuple[Tensor, Tensor]:
        if call.spec.finish is not None:
            return finish_rows(call, sums, values=values)
        if values is None:
            return logsumexp_tile.finish_rows(self._space, sums)
        return row_formulas.finish_rows(self._space, sums, values)

    def row_slopes(self, call: Call, values: Variables, weights: TargetWeights) -> Tensor:
        if call.spec.finish is not None:
            return row_slopes(call, values, weights)
        return row_formulas.row_slopes(self._space, values, weights)

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        assert tile.cosines is None
        tile = centers_tile.reduced(self._space, tile)
        return centers_tile.spread(self._space, logsumexp_tile.gradient(self._space, tile, rows))

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        logsumexp_pairs_tile.negatives(self._space, tile, rows, columns)

    def pair_sums_tile(self, tile: PairTile, rows: PairSums, columns: PairSums | None) -> None:
        logsumexp_pairs_tile.negatives(self._space, tile, rows, columns)

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        logsumexp_pairs_tile.positives(self._space, tile, rows, columns)

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        return logsumexp_pairs_tile.gradient(self._space, tile, rows, columns)

    def nearest_tile(self, tile: ClassTile, rows: Nearest) -> None:
        nearest_tile.search(self._space, centers_tile.reduced(self._space, tile), rows)

    # GEMMs of gradient tiles

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        addmm(total, left, right, self._space.inverse_scale)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return matmul(left, right, self._space.inverse_scale)

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        sums = torch.linalg.vector_norm(tile, ord=1, dim=dim, dtype=torch.float32)
        scale = self._space.inverse_scale
        return sums if scale is None else sums * scale

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        values, scale = tile[rows, columns].float(), self._space.inverse_scale
        return values if scale is None else values * scale


__all__ = ["TritonEngine"]
