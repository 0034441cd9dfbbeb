"""The tile work of the Triton backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..streaming import Call, SumTile
from . import configs, launch
from .kernels import logsumexp, rows, sum
from .losses import POLICIES, LogsumexpPolicy, SumPolicy
from .products import accumulate, product

#: Unit rows are zero-padded to a multiple of this, which every block_k divides.
DEPTH_MULTIPLE = 64
#: Leading dimension of gradient tiles: full-width stores, and rows aligned for the library.
STRIDE_MULTIPLE = 64
#: Largest float16 gradient aimed at; a quarter of the format's range is left for rounding up.
FLOAT16_TARGET = 2.0**14


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _floor(size: int, multiple: int) -> int:
    return size // multiple * multiple


def _uses_tf32() -> bool:
    """Whether the user lets float32 products run in TF32."""
    matmul = torch.backends.cuda.matmul
    # Reading the older flag raises once the newer one was set.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


class TritonEngine:
    """Engine of one call; see the protocol ``streaming.engine.Engine``.

    Gradient tiles and unit columns live in two buffers that every tile reuses, so that they stay
    in the L2 cache.
    """

    stat_dtype = torch.float32

    def __init__(self, call: Call, gradients: bool = True, capability: int | None = None) -> None:
        self._call = call
        self._gradients = gradients
        self._policy = POLICIES[call.spec.name]
        tf32 = call.compute_dtype == torch.float32 and _uses_tf32()
        self._precision = "tf32" if tf32 else "ieee"
        self._config = configs.select(
            launch.capability() if capability is None else capability, call.compute_dtype, tf32
        )
        self._columns: Tensor | None = None
        self._gradient: Tensor | None = None
        # float16 only: factor of the current gradient tile and its inverse, both (1,), and those
        # of each block of rows by the address of its targets' gradients.
        self._scales: dict[int, tuple[Tensor, Tensor]] = {}
        self._scale: Tensor | None = None
        self._inverse_scale: Tensor | None = None

    @property
    def sum_block(self) -> tuple[int, int]:
        wave = self._config.wave
        if not self._gradients:
            return wave.rows, wave.rows
        side = math.isqrt(wave.gradient_bytes // self._call.compute_dtype.itemsize)
        block = min(wave.gradient_rows, _floor(side, STRIDE_MULTIPLE))
        return block, block

    @property
    def class_block(self) -> tuple[int, int]:
        call, wave = self._call, self._config.wave
        size = call.compute_dtype.itemsize
        count, width = (_padded(max(extent, 1), DEPTH_MULTIPLE) for extent in call.rows.shape)
        columns = min(wave.columns, wave.unit_bytes // (width * size))
        height = wave.rows
        if self._gradients:
            height = min(wave.gradient_rows, count)
            columns = min(columns, wave.gradient_bytes // (height * size))
        return height, max(_floor(columns, STRIDE_MULTIPLE), STRIDE_MULTIPLE)

    # Rows

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        call = self._call
        if column_labels is None:
            # Classes: identities are positions. A target elsewhere is a row of negatives only.
            count = call.num_columns
            columns = torch.arange(count, dtype=torch.int32, device=row_labels.device)
            return torch.where(row_labels == -2, count, row_labels).to(torch.int32), columns
        same = column_labels is row_labels
        narrow = self._narrow(row_labels, row_labels, None if same else column_labels)
        if same:
            return narrow, narrow
        return narrow, self._narrow(column_labels, row_labels, column_labels)

    def _narrow(self, labels: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
        out = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
        block = configs.LABELS.block
        launch.run(
            rows.narrow_labels_kernel,
            -(-labels.numel() // block),
            labels,
            labels.numel(),
            first,
            first.numel(),
            first if second is None else second,
            0 if second is None else second.numel(),
            out,
            BLOCK=block,
            SEARCH=configs.LABELS.search,
            num_warps=configs.LABELS.num_warps,
        )
        return out

    def unit_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        count, width = stop - start, source.shape[1]
        stride = _padded(width, DEPTH_MULTIPLE)
        unit = self._buffer(self._columns if reuse else None, count * stride)
        if reuse:
            self._columns = unit
        unit = unit[: count * stride].view(count, stride)
        inverse_norms = self._empty(count, torch.float32)
        config = configs.rows(stride)
        launch.run(
            rows.unit_rows_kernel,
            -(-count // config.rows),
            source,
            index,
            start,
            unit,
            stride,
            inverse_norms,
            count,
            width,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        return unit[:, :width], inverse_norms

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
        count, width = d_unit.shape
        config = configs.rows(width)
        launch.run(
            rows.unit_rows_backward_kernel,
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
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    # Sum losses

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        policy = self._policy
        assert isinstance(policy, SumPolicy)
        per_column = self._call.spec.threshold == "per_column"
        heavy = per_column or tile.a_weights is not None
        config = self._config.sum_heavy if heavy else self._config.sum
        count, width = tile.a.shape[0], tile.b.shape[0]
        row_blocks = -(-count // config.block_m)
        column_blocks = -(-width // config.block_n)
        # A tile that compares a stretch of the batch with itself is its own mirror image.
        triangle = (
            tile.mirrored
            and tile.b_loss is None
            and tile.a_start == tile.b_start
            and count == width
            and config.block_m == config.block_n
        )
        programs = row_blocks * column_blocks
        if triangle:
            programs = row_blocks * (row_blocks + 1) // 2
        both = tile.b_loss is not None
        need_threshold = tile.d_threshold is not None

        column_stretches = column_blocks * config.parts
        row_stretches = row_blocks * config.parts
        row_loss = self._empty((column_stretches, count), torch.float32)
        column_loss = self._partial(both, row_stretches, width)
        row_threshold = self._partial(
            need_threshold and (both or triangle or not per_column), column_stretches, count
        )
        column_threshold = self._partial(need_threshold and per_column, row_stretches, width)
        if triangle:
            # Blocks above the diagonal fill the places that those below it would have.
            column_loss = row_loss
            if per_column and need_threshold:
                column_threshold = row_threshold
            elif row_threshold is not None:
                # Both directions are in one place, the other one stays empty.
                row_threshold.zero_()
        gradient = self._gradient_tile(count, width) if tile.gradient else None
        if tile.gradient:
            self._set_scale((1 + tile.mirrored) * policy.slope_bound(self._call.params))
        launch.run_product(
            sum.sum_kernel,
            config,
            programs,
            tile.a,
            tile.b,
            tile.a.stride(0),
            tile.b.stride(0),
            count,
            width,
            _padded(tile.a.shape[1], DEPTH_MULTIPLE),
            tile.a_start - tile.b_start,
            tile.a_labels,
            tile.b_labels,
            tile.a_threshold,
            tile.b_threshold,
            tile.a_weights,
            tile.b_weights,
            row_loss,
            column_loss,
            row_threshold,
            column_threshold,
            gradient,
            0 if gradient is None else gradient.stride(0),
            self._scale if tile.gradient else None,
            self._call.params,
            EVALUATE=policy.evaluate,
            TRIANGLE=triangle,
            BOTH=both,
            MIRRORED=tile.mirrored,
            EXCLUDE_DIAGONAL=tile.exclude_diagonal,
            PER_COLUMN=per_column,
            PARTS=config.parts,
            PRECISION=self._precision,
        )
        tile.a_loss += row_loss.sum(0)
        if tile.b_loss is not None:
            assert column_loss is not None
            tile.b_loss += column_loss.sum(0)
        if tile.d_threshold is not None:
            _add_threshold(tile, per_column, row_threshold, column_threshold, triangle)
        return gradient

    def _partial(self, wanted: bool, blocks: int, size: int) -> Tensor | None:
        return self._empty((blocks, size), torch.float32) if wanted else None

    # Logsumexp losses

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
        policy, config = self._policy, self._config.statistics
        assert isinstance(policy, LogsumexpPolicy)
        count, width = a.shape[0], b.shape[0]
        row_blocks = -(-count // config.block_m)
        column_blocks = -(-width // config.block_n)
        stretches = column_blocks * config.parts
        stretch_maximum = self._empty((stretches, count), torch.float32)
        stretch_total = self._empty((stretches, count), torch.float32)
        launch.run_product(
            logsumexp.statistics_kernel,
            config,
            row_blocks * column_blocks,
            a,
            b,
            a.stride(0),
            b.stride(0),
            count,
            width,
            _padded(a.shape[1], DEPTH_MULTIPLE),
            targets,
            start,
            stretch_maximum,
            stretch_total,
            target_cosine,
            self._call.params,
            NEGATIVE=policy.negative,
            PARTS=config.parts,
            PRECISION=self._precision,
        )
        merge = configs.MERGE
        launch.run(
            logsumexp.merge_kernel,
            -(-count // merge.rows),
            stretch_maximum,
            stretch_total,
            maximum,
            total,
            stretches,
            count,
            ROWS=merge.rows,
            BLOCK=merge.block,
            num_warps=merge.num_warps,
        )

    def positive_rows(self, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        policy = self._policy
        assert isinstance(policy, LogsumexpPolicy)
        target_cosine = target_cosine.contiguous()
        logits, slopes = torch.empty_like(target_cosine), torch.empty_like(target_cosine)
        count = target_cosine.numel()
        launch.run(
            logsumexp.positive_kernel,
            -(-count // configs.LABELS.block),
            target_cosine,
            logits,
            slopes,
            count,
            self._call.params,
            POSITIVE=policy.positive,
            BLOCK=configs.LABELS.block,
            num_warps=configs.LABELS.num_warps,
        )
        return logits, slopes

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
        policy, config = self._policy, self._config.gradient
        assert isinstance(policy, LogsumexpPolicy)
        count, width = a.shape[0], b.shape[0]
        gradient = self._gradient_tile(count, width)
        self._set_scale(policy.slope_bound(self._call.params), target_gradient)
        launch.run_product(
            logsumexp.gradient_kernel,
            config,
            -(-count // config.block_m) * -(-width // config.block_n),
            a,
            b,
            a.stride(0),
            b.stride(0),
            count,
            width,
            _padded(a.shape[1], DEPTH_MULTIPLE),
            targets,
            start,
            log_negatives,
            negative_weight,
            target_gradient,
            gradient,
            gradient.stride(0),
            self._scale,
            self._call.params,
            NEGATIVE=policy.negative,
            PRECISION=self._precision,
        )
        return gradient

    # Products of gradient tiles

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        accumulate(total, left, right, self._inverse_scale)

    def overwrite(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right, self._inverse_scale)

    # Buffers

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._call.rows.device)

    def _buffer(self, buffer: Tensor | None, size: int) -> Tensor:
        if buffer is None or buffer.numel() < size:
            return self._empty(size, self._call.compute_dtype)
        return buffer

    def _gradient_tile(self, count: int, width: int) -> Tensor:
        stride = _padded(width, STRIDE_MULTIPLE)
        self._gradient = self._buffer(self._gradient, count * stride)
        return self._gradient[: count * stride].view(count, stride)[:, :width]

    def _set_scale(self, bound: float, target_gradient: Tensor | None = None) -> None:
        """Picks the power of two that brings float16 gradients to the top of the format's range.

        ``bound`` holds for the negatives, whose weights are at most 1 in float16 calls; targets'
        gradients, with the slope of a margin in them, may be larger. Without a factor the many
        tiny gradients of a softmax would be flushed to zero. It stays on the device.
        """
        if self._call.compute_dtype != torch.float16:
            return
        key = 0 if target_gradient is None else target_gradient.data_ptr()
        if key not in self._scales:
            limit = self._empty(1, torch.float32).fill_(bound)
            if target_gradient is not None:
                limit = torch.maximum(limit, target_gradient.abs().amax())
            exponent = torch.floor(torch.log2(FLOAT16_TARGET / limit))
            # NaN gradients stay NaN by themselves.
            exponent = torch.nan_to_num(exponent, nan=0.0).clamp(-100.0, 100.0)
            self._scales[key] = torch.exp2(exponent), torch.exp2(-exponent)
        self._scale, self._inverse_scale = self._scales[key]


def _add_threshold(
    tile: SumTile,
    per_column: bool,
    row_threshold: Tensor | None,
    column_threshold: Tensor | None,
    triangle: bool,
) -> None:
    """Adds the blocks' threshold gradients, always in the same order."""
    assert tile.d_threshold is not None
    if not per_column:
        assert row_threshold is not None
        tile.d_threshold += row_threshold.sum()
        return
    assert column_threshold is not None
    stop = tile.b_start + tile.b.shape[0]
    tile.d_threshold[tile.b_start : stop] += column_threshold.sum(0)
    if row_threshold is not None and not triangle:
        stop = tile.a_start + tile.a.shape[0]
        tile.d_threshold[tile.a_start : stop] += row_threshold.sum(0)


__all__ = ["TritonEngine"]
