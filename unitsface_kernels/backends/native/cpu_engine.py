"""Tiles on the CPU: ``torch.mm`` for products, the extension's vectorised epilogues in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streaming import Call, SumTile
from .loader import extension

# A tile of 4 MB and a column block of 2 MB (D = 512) stay in a last-level cache of 8 MB and more;
# products lose speed below about 512 columns. Measured with bench/tile_sizes.py.
ROW_BLOCK = 1024
COLUMN_BLOCK = 1024
INT32_MAX = 2**31 - 1


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CpuEngine:
    """See :class:`unitsface_kernels.backends.streaming.Engine`.

    Products are float32 whatever the inputs: half-precision rows are widened tile by tile.
    """

    sum_block = (ROW_BLOCK, COLUMN_BLOCK)
    class_block = (ROW_BLOCK, COLUMN_BLOCK)
    stat_dtype = torch.float64

    def __init__(self, call: Call) -> None:
        self.native = extension()
        self.loss = call.spec.name
        self.params = list(call.params)
        self.per_column = call.spec.threshold == "per_column"
        self.threads = torch.get_num_threads()
        self.buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Float32 scratch that the next buffer of this name overwrites."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=torch.float32)
        return buffer[:size].view(shape)

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Identities as int32, which fill a vector register twice as densely as int64."""
        assert column_labels is not None
        both = [row_labels] if column_labels is row_labels else [row_labels, column_labels]
        if any(len(t) and int(t.max()) > INT32_MAX for t in both):
            joined = torch.cat(both)
            dense = torch.unique(joined, return_inverse=True)[1].where(joined >= 0, -1)
            both = list(dense.split([len(t) for t in both]))
        narrow = [t.to(torch.int32) for t in both]
        return narrow[0], narrow[-1]

    def unit_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        count, size = stop - start, source.shape[1]
        if reuse:
            unit, inverse_norms = self._buffer("unit", count, size), self._buffer("norms", count)
        else:
            unit = torch.empty(count, size, dtype=torch.float32)
            inverse_norms = torch.empty(count, dtype=torch.float32)
        source, start, index = _float32_rows(source, start, count, index)
        self.native.cpu.unit_rows(
            self.native.UnitRows(
                source=source.data_ptr(),
                index=address(index),
                start=start,
                n=count,
                d=size,
                unit=unit.data_ptr(),
                inverse_norms=inverse_norms.data_ptr(),
            ),
            self.threads,
        )
        return unit, inverse_norms

    def unit_rows_backward(
        self,
        d_unit: Tensor,
        source: Tensor,
        start: int,
        inverse_norms: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        result = out if out.dtype == torch.float32 else d_unit
        count, size = d_unit.shape
        source, start, index = _float32_rows(source, start, count, index)
        self.native.cpu.unit_rows_backward(
            self.native.UnitRowsBackward(
                d_unit=d_unit.data_ptr(),
                source=source.data_ptr(),
                index=address(index),
                start=start,
                n=count,
                d=size,
                inverse_norms=inverse_norms.data_ptr(),
                out=result.data_ptr(),
                scale=address(scale),
            ),
            self.threads,
        )
        if result is not out:
            out.copy_(result)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b.T, out=self._buffer("product", a.shape[0], b.shape[0]))

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        product = self._product(tile.a, tile.b)
        n, m = product.shape
        d_rows = d_columns = tile.d_threshold
        if self.per_column and tile.d_threshold is not None:
            d_rows = tile.d_threshold[tile.a_start : tile.a_start + n]
            d_columns = tile.d_threshold[tile.b_start : tile.b_start + m]
        arguments = self.native.CpuSumTile(
            product=product.data_ptr(),
            gradient=product.data_ptr() if tile.gradient else 0,
            n=n,
            m=m,
            stride=m,
            a_labels=tile.a_labels.data_ptr(),
            b_labels=tile.b_labels.data_ptr(),
            a_threshold=tile.a_threshold.data_ptr(),
            b_threshold=tile.b_threshold.data_ptr(),
            per_column=self.per_column,
            a_weights=address(tile.a_weights),
            b_weights=address(tile.b_weights),
            a_loss=tile.a_loss.data_ptr(),
            b_loss=address(tile.b_loss),
            a_dthreshold=address(d_rows),
            b_dthreshold=address(d_columns),
            mirrored=tile.mirrored,
        )
        if tile.exclude_diagonal:
            arguments.skip = tile.a_start - tile.b_start
        else:
            arguments.skip = self.native.NO_SKIP
        self.native.cpu.sum_tile(self.loss, self.params, arguments, self.threads)
        return product if tile.gradient else None

    def logsumexp_tile(
        self,
        a: Tensor,
        b: Tensor,
        targets: Tensor,
        start: int,
        maximum: Tensor,
        total: Tensor,
        target_cosine: Tensor,
    ) -> None:
        product = self._product(a, b)
        n, m = product.shape
        self.native.cpu.logsumexp_tile(
            self.loss,
            self.params,
            self.native.LogsumexpTile(
                product=product.data_ptr(),
                n=n,
                m=m,
                stride=m,
                targets=targets.data_ptr(),
                start=start,
                maximum=maximum.data_ptr(),
                total=total.data_ptr(),
                target_cosine=target_cosine.data_ptr(),
            ),
            self.threads,
        )

    def positive_rows(self, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        logits, slope = torch.empty_like(target_cosine), torch.empty_like(target_cosine)
        self.native.cpu.positive_rows(
            self.loss,
            self.params,
            target_cosine.data_ptr(),
            len(target_cosine),
            logits.data_ptr(),
            slope.data_ptr(),
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
    ) -> Tensor:
        product = self._product(a, b)
        n, m = product.shape
        self.native.cpu.logsumexp_gradient_tile(
            self.loss,
            self.params,
            self.native.LogsumexpGradientTile(
                product=product.data_ptr(),
                gradient=product.data_ptr(),
                n=n,
                m=m,
                stride=m,
                targets=targets.data_ptr(),
                start=start,
                log_negatives=log_negatives.data_ptr(),
                negative_weight=negative_weight.data_ptr(),
                target_gradient=target_gradient.data_ptr(),
            ),
            self.threads,
        )
        return product

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        total.addmm_(left, right)

    def overwrite(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out=self._buffer("d_unit", left.shape[0], right.shape[1]))


def _float32_rows(
    source: Tensor, start: int, count: int, index: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """The same rows of a float32 matrix: the matrix itself, or a widened copy of the rows."""
    if index is not None:
        index = index[start : start + count]
    if source.dtype == torch.float32:
        return source, start, index
    if index is not None:
        return source.index_select(0, index).to(torch.float32), 0, None
    return source[start : start + count].to(torch.float32), 0, None
