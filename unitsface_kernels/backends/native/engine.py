"""Shared part of the CPU and the CUDA engine: arguments of the extension's tile kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..histogram import HistogramTile
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
    UnitRows,
    Variables,
    finish_rows,
    row_slopes,
)
from .arguments import BY_ROW, matrix_argument, slopes_of, variables_of
from .loader import extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeEngine(UnitRows, BothProducts, CenterTiles, Reductions, ABC):
    """See :class:`unitsface_kernels.backends.streaming.Engine`.

    Subclasses choose dtypes and tile sizes, multiply, and launch: ``_kernel(name, *arguments)``.
    """

    #: Element type of unit rows and of gradient tiles, the operands of the GEMMs.
    operand_dtype = torch.float32
    #: Element types of rows that the kernels read, and of their gradients that these write.
    row_dtypes = frozenset(DTYPE_CODES)
    #: Factor of gradient tiles as they are stored.
    gradient_scale = 1.0
    #: Sums per row are as fast.
    total_slots = 0
    #: A workspace would do as well where GEMMs are cheaper than memory.
    keeps_cosines = False
    #: Decisions of gradient filtering are the host's: library GEMMs have sizes of the host.
    device_filter: DeviceFilter | None = None
    #: Prefix of the extension's argument types that depend on the device.
    arguments_prefix: str

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        """``call`` None: an engine on ``device`` for unit rows, cosines and histograms only."""
        self.native = extension()
        #: Memory by name, with the last view of it and the shape of that.
        self.workspaces: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        if call is None:
            assert device is not None
            self.device = device
            return
        self.device = call.rows.device
        self.loss = (call.spec.tiles or call.spec).name
        self.num_columns, self.centers = call.num_columns, call.centers
        self.params = list(call.kernel_params)
        self.per_column = call.spec.threshold == "per_column"

    @abstractmethod
    def _kernel(self, name: str, *arguments: Any, workspace: Sequence[int] | None = None) -> None:
        """Runs the extension's kernel ``name``; ``workspace``: rows and columns of its tile."""

    def _arguments(self, name: str, **values: Any) -> Any:
        return getattr(self.native, self.arguments_prefix + name)(**values)

    def _workspace(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that the next workspace of this name overwrites."""
        held = self.workspaces.get(name)
        if held is not None and held[0] == shape:
            return held[1]
        size = math.prod(shape)
        whole = None if held is None else held[2]
        if whole is None or whole.numel() < size:
            whole = torch.empty(size, dtype=dtype, device=self.device)
        view = whole[:size].view(shape)
        self.workspaces[name] = shape, view, whole
        return view

    def _gradient_workspace(self, cosines: Tensor) -> Tensor:
        """Where a gradient tile goes: over the cosines if it has the operands' dtype."""
        if cosines.dtype == self.operand_dtype:
            return cosines
        return self._workspace("gradient", *cosines.shape, dtype=self.operand_dtype)

    def _class_labels(self, row_labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Classes are positions; a target in another shard (-2) is the position of none."""
        columns = torch.arange(self.num_columns, dtype=dtype, device=self.device)
        return torch.where(row_labels == -2, self.num_columns, row_labels).to(dtype), columns

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        count, size = stop - start, source.shape[1]
        if reuse:
            unit = self._workspace("unit", count, size, dtype=self.operand_dtype)
            inverse_norms = self._workspace("norms", count)
        else:
            unit = torch.empty(count, size, dtype=self.operand_dtype, device=self.device)
            inverse_norms = torch.empty(count, dtype=torch.float32, device=self.device)
        source, start, index = self._readable(source, start, count, index)
        self._kernel(
            "normalize_rows",
            self.native.NormalizeRows(
                source=source,
                source_dtype=DTYPE_CODES[source.dtype],
                index=index,
                start=start,
                n=count,
                d=size,
                rows=source.shape[0],
                unit=unit,
                unit_dtype=DTYPE_CODES[unit.dtype],
                inverse_norms=inverse_norms,
            ),
        )
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
        count, size = d_unit.shape
        source, start, index = self._readable(source, start, count, index)
        result = out if out.dtype in self.row_dtypes else d_unit
        self._kernel(
            "normalize_rows_backward",
            self.native.NormalizeRowsBackward(
                d_unit=d_unit,
                source=source,
                source_dtype=DTYPE_CODES[source.dtype],
                index=index,
                start=start,
                n=count,
                d=size,
                rows=source.shape[0],
                inverse_norms=inverse_norms,
                out=result,
                out_dtype=DTYPE_CODES[result.dtype],
                scale=scale,
            ),
        )
        if result is not out:
            out.copy_(result)

    def _readable(
        self, source: Tensor, start: int, count: int, index: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        """The rows' source, first row and index in a form that the kernels read."""
        if index is not None:
            index = index[start : start + count]
        if source.dtype in self.row_dtypes:
            return source, start, index
        rows = source[start : start + count] if index is None else source[index]
        return rows.to(torch.float32), 0, None

    def _cosines_of(
        self, tile: SumTile | ClassTile | PairTile, kept: Tensor | None = None
    ) -> Tensor:
        """(n, m) cosines that a tile's kernel reads; ``kept``: where they stay for another pass."""
        if isinstance(tile, PairTile):
            return self.cosines(tile.a, tile.b)
        return self._columns(tile, kept)

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        cosines = self._cosines_of(tile)
        n, m = cosines.shape
        gradient = self._gradient_workspace(cosines) if tile.gradient else None
        d_rows = d_columns = tile.d_threshold
        if self.per_column and tile.d_threshold is not None:
            d_rows = tile.d_threshold[tile.a_start : tile.a_start + n]
            d_columns = tile.d_threshold[tile.b_start : tile.b_start + m]
        arguments = self._arguments(
            "SumTile",
            cosines=matrix_argument(cosines),
            gradient=matrix_argument(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            n=n,
            m=m,
            stride=cosines.stride(0),
            a_labels=tile.a_labels,
            b_labels=tile.b_labels,
            a_threshold=tile.a_threshold,
            b_threshold=tile.b_threshold,
            per_column=self.per_column,
            a_weights=tile.a_weights,
            b_weights=tile.b_weights,
            a_loss=tile.a_loss,
            b_loss=tile.b_loss,
            a_dthreshold=d_rows,
            b_dthreshold=d_columns,
            diagonal=self.native.NO_DIAGONAL if tile.diagonal is None else tile.diagonal,
            mirrored=tile.mirrored,
            **variables_of(tile.variables, tile.d_variables),
        )
        self._kernel("sum_tile", self.loss, self.params, arguments, workspace=cosines.shape)
        return None if gradient is None else self._of_vectors(gradient)

    def logsumexp_tile(self, tile: ClassTile, rows: ClassSums) -> None:
        cosines = self._cosines_of(tile, tile.cosines)
        arguments = self.native.LogsumexpTile(
            **self._classes(tile, cosines),
            maximum=rows.maximum,
            total=rows.total,
            target_cosine=rows.target_cosine,
            **variables_of(tile.variables),
        )
        self._kernel("logsumexp_tile", self.loss, self.params, arguments, workspace=cosines.shape)

    def nearest_tile(self, tile: ClassTile, rows: Nearest) -> None:
        arguments = self.native.NearestTile(
            **self._classes(tile, self._columns(tile)),
            k=rows.best.shape[1],
            best=rows.best,
            position=rows.position,
            target_cosine=rows.target_cosine,
        )
        self._kernel("nearest_tile", arguments)

    def _positive_rows(self, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        target_cosine = target_cosine.contiguous()
        logits, slope = torch.empty_like(target_cosine), torch.empty_like(target_cosine)
        self._kernel(
            "positive_rows",
            self.loss,
            self.params,
            target_cosine,
            target_cosine.shape[0],
            logits,
            slope,
        )
        return logits, slope

    def finish_rows(
        self, call: Call, sums: ClassSums, values: Variables | None = None
    ) -> tuple[Tensor, Tensor]:
        return finish_rows(call, sums, self._positive_rows, values)

    row_slopes = staticmethod(row_slopes)

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        cosines = self._cosines_of(tile) if tile.cosines is None else self._kept(tile.cosines)
        gradient = self._gradient_workspace(cosines)
        arguments = self.native.LogsumexpGradientTile(
            **self._classes(tile, cosines),
            gradient=matrix_argument(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            log_negatives=rows.log_negatives,
            negative_weight=rows.negative,
            target_gradient=rows.target,
            **variables_of(tile.variables, tile.d_variables, BY_ROW),
        )
        self._kernel("logsumexp_gradient_tile", self.loss, self.params, arguments)
        return self._of_vectors(gradient)

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        sums = torch.linalg.vector_norm(tile, ord=1, dim=dim, dtype=torch.float32)
        return sums / self.gradient_scale

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return tile[rows, columns].float() / self.gradient_scale

    def histogram_tile(self, cosines: Tensor, tile: HistogramTile) -> None:
        n, m = cosines.shape
        arguments = self._arguments(
            "HistogramTile",
            cosines=cosines,
            n=n,
            m=m,
            stride=m,
            a_labels=tile.a_labels,
            b_labels=tile.b_labels,
            diagonal=self.native.NO_DIAGONAL if tile.diagonal is None else tile.diagonal,
            upper=tile.upper,
            low=tile.binning.low,
            scale=tile.binning.scale,
            bins=tile.binning.bins,
            range_of_bin=tile.range_of_bin,
            ranges=tile.ranges,
            slots=tile.counts.shape[-1],
            counts=tile.counts,
            per_row=tile.counts.dim() == 3,
        )
        self._kernel("histogram_tile", arguments)

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        self._fold_pairs(tile, rows, columns)

    def pair_sums_tile(self, tile: PairTile, rows: PairSums, columns: PairSums | None) -> None:
        self._fold_pairs(tile, rows, columns)

    def _fold_pairs(
        self,
        tile: PairTile,
        rows: NegativeSums | PairSums,
        columns: NegativeSums | PairSums | None,
    ) -> None:
        cosines = self._cosines_of(tile)
        sums = {f"a_{name}": t for name, t in rows._asdict().items()}
        if columns is not None:
            sums |= {f"b_{name}": t for name, t in columns._asdict().items()}
        arguments = self._arguments("PairNegatives", **self._pairs(tile, cosines), **sums)
        self._kernel(
            "pair_negatives_tile", self.loss, self.params, arguments, workspace=cosines.shape
        )

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        cosines = self._cosines_of(tile)
        self._kernel(
            "pair_positives_tile",
            self.loss,
            self.params,
            self._arguments(
                "PairPositives",
                **self._pairs(tile, cosines),
                a_log_negatives=rows.log_negatives,
                a_loss=rows.loss,
                a_negative_prob=rows.negative_prob,
                b_log_negatives=columns and columns.log_negatives,
                b_loss=columns and columns.loss,
                b_negative_prob=columns and columns.negative_prob,
            ),
            workspace=cosines.shape,
        )

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        cosines = self._cosines_of(tile)
        gradient = self._gradient_workspace(cosines)
        arguments = self._arguments(
            "PairGradient",
            **self._pairs(tile, cosines),
            gradient=matrix_argument(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            a_log_negatives=rows.log_negatives,
            a_negative_weight=rows.negative,
            a_positive_weight=rows.positive,
            b_log_negatives=columns and columns.log_negatives,
            b_negative_weight=columns and columns.negative,
            b_positive_weight=columns and columns.positive,
            a_log_positives=rows.log_positives,
            b_log_positives=columns and columns.log_positives,
            **slopes_of(tile),
        )
        self._kernel("pair_gradient_tile", self.loss, self.params, arguments)
        return gradient

    def _classes(self, tile: ClassTile, cosines: Tensor) -> dict[str, Any]:
        """The arguments that all tiles against classes have."""
        n, m = cosines.shape
        return {
            "cosines": matrix_argument(cosines),
            "n": n,
            "m": m,
            "stride": cosines.stride(0),
            "targets": tile.targets,
            "start": tile.start,
        }

    def _pairs(self, tile: PairTile, cosines: Tensor) -> dict[str, Any]:
        """The arguments that all tiles of a log-sum-exp over samples have."""
        n, m = cosines.shape
        return {
            "cosines": matrix_argument(cosines),
            "n": n,
            "m": m,
            "stride": cosines.stride(0),
            "a_labels": tile.a_labels,
            "b_labels": tile.b_labels,
            "diagonal": self.native.NO_DIAGONAL if tile.diagonal is None else tile.diagonal,
            **variables_of(tile.variables),
        }
