"""What the CPU and the CUDA engine have in common: arguments of the extension's tile kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..histogram import HistogramTile
from ..streaming import Call, NegativeSums, PairTile, PairWeights, PositiveSums, SumTile
from .loader import extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> tuple[int, int] | None:
    """What the extension takes for a pointer: where a dense tensor lies, and its bytes.

    The extension knows what its kernels read and write, and refuses a shorter one.
    """
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.nbytes


def strided_address(matrix: Tensor) -> tuple[int, int]:
    """The same of a matrix whose strides the extension is told: of all that it may touch."""
    if not matrix.numel():
        return 0, 0
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    elements = (rows - 1) * row + (columns - 1) * column + 1
    return matrix.data_ptr(), elements * matrix.element_size()


class NativeEngine(ABC):
    """See :class:`unitsface_kernels.backends.streaming.Engine`.

    Subclasses choose dtypes and tile sizes, multiply, and launch: ``_kernel(name, *arguments)``.
    """

    #: Element type of unit rows and of gradient tiles, the operands of the products.
    operand_dtype = torch.float32
    #: Factor of gradient tiles as they are stored.
    gradient_scale = 1.0
    #: Scratch would do as well where products are cheaper than memory.
    keeps_cosines = False
    #: Prefix of the extension's argument types that depend on the device.
    arguments_prefix: str

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        """Without a call, on ``device``: unit rows, products and histograms, but no loss."""
        self.native = extension()
        self.buffers: dict[str, Tensor] = {}
        if call is None:
            assert device is not None
            self.device = device
            return
        self.device = call.rows.device
        self.loss = call.spec.name
        self.num_columns = call.num_columns
        self.params = list(call.params)
        self.per_column = call.spec.threshold == "per_column"

    @abstractmethod
    def _kernel(self, name: str, *arguments: Any, scratch: tuple[int, int] | None = None) -> None:
        """Runs the extension's kernel ``name``; ``scratch``: rows and columns of its tile."""

    def _arguments(self, name: str, **values: Any) -> Any:
        return getattr(self.native, self.arguments_prefix + name)(**values)

    @abstractmethod
    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, D), (m, D) -> (n, m) float32 cosines, in ``out`` or valid until the next product."""

    def cosines(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, m) float32 cosines of unit rows, valid until the next product."""
        return self._product(a, b)

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch that the next buffer of this name overwrites."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self.buffers[name] = buffer
        return buffer[:size].view(shape)

    def _gradient_buffer(self, product: Tensor) -> Tensor:
        """Where a gradient tile goes: over the product if it has the operands' dtype."""
        if product.dtype == self.operand_dtype:
            return product
        return self._buffer("gradient", *product.shape, dtype=self.operand_dtype)

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
            unit = self._buffer("unit", count, size, dtype=self.operand_dtype)
            inverse_norms = self._buffer("norms", count)
        else:
            unit = torch.empty(count, size, dtype=self.operand_dtype, device=self.device)
            inverse_norms = torch.empty(count, dtype=torch.float32, device=self.device)
        source, start, index = self._readable(source, start, count, index)
        self._kernel(
            "normalize_rows",
            self.native.NormalizeRows(
                source=address(source),
                source_dtype=DTYPE_CODES[source.dtype],
                index=address(index),
                start=start,
                n=count,
                d=size,
                rows=source.shape[0],
                unit=address(unit),
                unit_dtype=DTYPE_CODES[unit.dtype],
                inverse_norms=address(inverse_norms),
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
    ) -> None:
        count, size = d_unit.shape
        source, start, index = self._readable(source, start, count, index)
        result = self._writable(out, d_unit)
        self._kernel(
            "normalize_rows_backward",
            self.native.NormalizeRowsBackward(
                d_unit=address(d_unit),
                source=address(source),
                source_dtype=DTYPE_CODES[source.dtype],
                index=address(index),
                start=start,
                n=count,
                d=size,
                rows=source.shape[0],
                inverse_norms=address(inverse_norms),
                out=address(result),
                out_dtype=DTYPE_CODES[result.dtype],
                scale=address(scale),
            ),
        )
        if result is not out:
            out.copy_(result)

    def _readable(
        self, source: Tensor, start: int, count: int, index: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        """The rows' source, first row and index in a form that the kernels read."""
        return source, start, None if index is None else index[start : start + count]

    def _writable(self, out: Tensor, fallback: Tensor) -> Tensor:
        """``out``, or ``fallback`` if the kernels cannot write its dtype."""
        return out

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        product = self._product(tile.a, tile.b)
        n, m = product.shape
        gradient = self._gradient_buffer(product) if tile.gradient else None
        d_rows = d_columns = tile.d_threshold
        if self.per_column and tile.d_threshold is not None:
            d_rows = tile.d_threshold[tile.a_start : tile.a_start + n]
            d_columns = tile.d_threshold[tile.b_start : tile.b_start + m]
        arguments = self._arguments(
            "SumTile",
            product=address(product),
            gradient=address(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            n=n,
            m=m,
            stride=m,
            a_labels=address(tile.a_labels),
            b_labels=address(tile.b_labels),
            a_threshold=address(tile.a_threshold),
            b_threshold=address(tile.b_threshold),
            per_column=self.per_column,
            a_weights=address(tile.a_weights),
            b_weights=address(tile.b_weights),
            a_loss=address(tile.a_loss),
            b_loss=address(tile.b_loss),
            a_dthreshold=address(d_rows),
            b_dthreshold=address(d_columns),
            skip=self.native.NO_SKIP if tile.skip is None else tile.skip,
            mirrored=tile.mirrored,
        )
        self._kernel("sum_tile", self.loss, self.params, arguments, scratch=(n, m))
        return gradient

    def logsumexp_tile(
        self,
        a: Tensor,
        b: Tensor,
        targets: Tensor,
        start: int,
        maximum: Tensor,
        total: Tensor,
        target_cosine: Tensor,
        cosines: Tensor | None = None,
    ) -> None:
        product = self._product(a, b, cosines)
        n, m = product.shape
        arguments = self.native.LogsumexpTile(
            product=address(product),
            n=n,
            m=m,
            stride=m,
            targets=address(targets),
            start=start,
            maximum=address(maximum),
            total=address(total),
            target_cosine=address(target_cosine),
        )
        self._kernel("logsumexp_tile", self.loss, self.params, arguments, scratch=(n, m))

    def nearest_tile(
        self,
        a: Tensor,
        b: Tensor,
        targets: Tensor,
        start: int,
        best: Tensor,
        position: Tensor,
        target_cosine: Tensor,
    ) -> None:
        product = self._product(a, b)
        n, m = product.shape
        arguments = self.native.NearestTile(
            product=address(product),
            n=n,
            m=m,
            stride=m,
            targets=address(targets),
            start=start,
            k=best.shape[1],
            best=address(best),
            position=address(position),
            target_cosine=address(target_cosine),
        )
        self._kernel("nearest_tile", arguments)

    def positive_rows(self, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        target_cosine = target_cosine.contiguous()
        logits, slope = torch.empty_like(target_cosine), torch.empty_like(target_cosine)
        self._kernel(
            "positive_rows",
            self.loss,
            self.params,
            address(target_cosine),
            target_cosine.shape[0],
            address(logits),
            address(slope),
        )
        return logits, slope

    def logsumexp_gradient_tile(
        self,
        a: Tensor,
        b: Tensor,
        targets: Tensor,
        start: int,
        log_negatives: Tensor,
        negative_weight: Tensor,
        target_gradient: Tensor,
        cosines: Tensor | None = None,
    ) -> Tensor:
        product = self._product(a, b) if cosines is None else cosines
        n, m = product.shape
        gradient = self._gradient_buffer(product)
        arguments = self.native.LogsumexpGradientTile(
            product=address(product),
            gradient=address(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            n=n,
            m=m,
            stride=m,
            targets=address(targets),
            start=start,
            log_negatives=address(log_negatives),
            negative_weight=address(negative_weight),
            target_gradient=address(target_gradient),
        )
        self._kernel("logsumexp_gradient_tile", self.loss, self.params, arguments)
        return gradient

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        sums = torch.linalg.vector_norm(tile, ord=1, dim=dim, dtype=torch.float32)
        return sums / self.gradient_scale

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return tile[rows, columns].float() / self.gradient_scale

    def histogram_tile(self, product: Tensor, tile: HistogramTile) -> None:
        n, m = product.shape
        arguments = self._arguments(
            "HistogramTile",
            product=address(product),
            n=n,
            m=m,
            stride=m,
            a_labels=address(tile.a_labels),
            b_labels=address(tile.b_labels),
            skip=self.native.NO_SKIP if tile.skip is None else tile.skip,
            upper=tile.upper,
            low=tile.binning.low,
            scale=tile.binning.scale,
            bins=tile.binning.bins,
            range_of_bin=address(tile.range_of_bin),
            ranges=address(tile.ranges),
            slots=tile.counts.shape[-1],
            counts=address(tile.counts),
            per_row=tile.counts.dim() == 3,
        )
        self._kernel("histogram_tile", arguments)

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        product = self._product(tile.a, tile.b)
        self._kernel(
            "pair_negatives_tile",
            self.loss,
            self.params,
            self._arguments(
                "PairNegatives",
                **self._pairs(tile, product),
                a_maximum=address(rows.maximum),
                a_total=address(rows.total),
                b_maximum=address(columns and columns.maximum),
                b_total=address(columns and columns.total),
            ),
            scratch=(product.shape[0], product.shape[1]),
        )

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        product = self._product(tile.a, tile.b)
        self._kernel(
            "pair_positives_tile",
            self.loss,
            self.params,
            self._arguments(
                "PairPositives",
                **self._pairs(tile, product),
                a_log_negatives=address(rows.log_negatives),
                a_loss=address(rows.loss),
                a_share=address(rows.share),
                b_log_negatives=address(columns and columns.log_negatives),
                b_loss=address(columns and columns.loss),
                b_share=address(columns and columns.share),
            ),
            scratch=(product.shape[0], product.shape[1]),
        )

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        product = self._product(tile.a, tile.b)
        gradient = self._gradient_buffer(product)
        arguments = self._arguments(
            "PairGradient",
            **self._pairs(tile, product),
            gradient=address(gradient),
            gradient_dtype=DTYPE_CODES[self.operand_dtype],
            gradient_scale=self.gradient_scale,
            a_log_negatives=address(rows.log_negatives),
            a_negative_weight=address(rows.negative),
            a_positive_weight=address(rows.positive),
            b_log_negatives=address(columns and columns.log_negatives),
            b_negative_weight=address(columns and columns.negative),
            b_positive_weight=address(columns and columns.positive),
        )
        self._kernel("pair_gradient_tile", self.loss, self.params, arguments)
        return gradient

    def _pairs(self, tile: PairTile, product: Tensor) -> dict[str, Any]:
        """The arguments that all tiles of a log-sum-exp over samples have."""
        n, m = product.shape
        return {
            "product": address(product),
            "n": n,
            "m": m,
            "stride": m,
            "a_labels": address(tile.a_labels),
            "b_labels": address(tile.b_labels),
            "skip": self.native.NO_SKIP if tile.skip is None else tile.skip,
        }
