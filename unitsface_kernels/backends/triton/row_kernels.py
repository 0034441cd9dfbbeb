"""Rows and columns of a call at unit length, and the way of gradients back to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streaming import Call, RowStep, TileColumns
from . import configs, launch
from .configs import WaveConfig
from .kernels import rows, update
from .workspace import DEPTH_MULTIPLE, Workspace, padded

#: A batch's rows at unit length are kept for the backward pass up to this part of the columns that
#: a wave has at unit length.
PART_OF_ROWS = 8


class RowKernels:
    """Kernels over the rows of an engine, which has the attributes below."""

    _call: Call
    _space: Workspace
    _wave: WaveConfig

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return self._normalize(source, start, stop, index, reuse)

    def unit_rows(self, call: Call) -> tuple[Tensor, Tensor]:
        cache = call.cache
        if cache is not None and cache.unit_rows is not None:
            return cache.unit_rows
        found = self._normalize(call.rows, 0, call.rows.shape[0], labels=call.row_labels)
        if cache is not None and found[0].nbytes <= self._wave.unit_bytes // PART_OF_ROWS:
            cache.unit_rows = found
        return found

    def _normalize(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        unit, inverse_norms = self._space.unit_tile(stop - start, source.shape[1], reuse)
        self._write_unit(source, index, start, unit, inverse_norms, labels)
        return unit, inverse_norms

    def _write_unit(
        self,
        source: Tensor,
        index: Tensor | None,
        start: int,
        unit: Tensor | None,
        inverse_norms: Tensor,
        labels: Tensor | None = None,
    ) -> None:
        """``unit``, if given, and ``inverse_norms`` (n,) of the rows from ``start``."""
        count, width = inverse_norms.shape[0], source.shape[1]
        stride = padded(width, DEPTH_MULTIPLE)
        config = configs.rows(stride)
        launch.run(
            rows.normalize_rows_kernel,
            -(-count // config.rows),
            source,
            index,
            start,
            unit,
            stride,
            inverse_norms,
            count,
            width,
            labels,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    def tile_columns(
        self, source: Tensor, start: int, stop: int, index: Tensor | None = None
    ) -> TileColumns:
        if index is None and self._call.centers == 1 and self._space.multiplies(source):
            return TileColumns(source[start:stop], self._norms(source, start, stop), raw=True)
        return TileColumns(*self._copied(source, start, stop, index))

    def _copied(
        self, source: Tensor, start: int, stop: int, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The call's columns at unit length; the first pass keeps a small copy for the others."""
        call, cache, width = self._call, self._call.cache, source.shape[1]
        count, stride = call.num_vectors, padded(width, DEPTH_MULTIPLE)
        size = count * stride * call.compute_dtype.itemsize
        needed = cache is not None and call.need_any and start <= cache.num_units
        if cache is None or not needed or size > self._wave.gradient_bytes:
            return self.normalize_rows(source, start, stop, index, reuse=True)
        if cache.unit_columns is None:
            cache.unit_columns = self._space.unit_tile(count, width, reuse=False)
        unit, inverse_norms = (whole[start:stop] for whole in cache.unit_columns)
        if cache.num_units < stop:
            self._write_unit(source, index, start, unit, inverse_norms)
            cache.num_units = stop
        return unit, inverse_norms

    def _norms(self, source: Tensor, start: int, stop: int) -> Tensor:
        """Inverse norms of the call's columns; the first pass keeps them for the others."""
        cache, first = self._call.cache, start
        if cache is None or start > cache.num_norms:
            norms = self._space.factors(stop - start)
        else:
            if cache.inverse_norms is None:
                cache.inverse_norms = self._space.factors(source.shape[0])
            norms = cache.inverse_norms[start:stop]
            first = cache.num_norms
            cache.num_norms = max(first, stop)
        if first < stop:
            self._write_unit(source, None, start, None, norms)
        return norms

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
        self._normalize_backward(d_unit, source, start, inverse_norms, out, scale, index, raw=raw)

    def unit_rows_backward(
        self, call: Call, d_unit: Tensor, inverse_norms: Tensor, scale: Tensor | None
    ) -> None:
        self._normalize_backward(
            d_unit, call.rows, 0, inverse_norms, d_unit, scale, labels=call.row_labels
        )

    def _normalize_backward(
        self,
        d_unit: Tensor,
        source: Tensor,
        start: int,
        inverse_norms: Tensor,
        out: Tensor,
        scale: Tensor | None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        raw: bool = False,
    ) -> None:
        count, width = d_unit.shape
        config = configs.rows(width)
        launch.run(
            rows.normalize_rows_backward_kernel,
            -(-count // config.rows),
            d_unit,
            source,
            index,
            start,
            inverse_norms,
            scale,
            out,
            count,
            width,
            labels,
            RAW=raw,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    def update_columns(
        self,
        call: Call,
        part: slice,
        d_unit: Tensor,
        inverse_norms: Tensor,
        scale: Tensor | None,
        raw: bool,
    ) -> bool:
        step: RowStep | None = getattr(call.sink, "step", None)
        columns = call.columns
        if step is None or columns is None or step.weight.data_ptr() != columns.data_ptr():
            return False
        count, width = d_unit.shape
        config = configs.rows(width)
        first, second = (*step.states, None, None)[:2]
        launch.run(
            update.update_rows_kernel,
            -(-count // config.rows),
            d_unit,
            columns,
            call.vector_index,
            part.start,
            inverse_norms,
            scale,
            step.scale,
            first,
            second,
            count,
            width,
            tuple(step.numbers[name] for name in update.NUMBERS[step.rule]),
            RAW=raw,
            RULE=step.rule,
            NESTEROV=bool(step.numbers.get("nesterov", False)),
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        # Autograd reports a graph that needs the old values.
        torch.autograd.graph.increment_version((step.weight, *step.states))
        return True
