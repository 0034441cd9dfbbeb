"""GEMMs of gradient tiles over the rows that gradient filtering selected on the device."""

from __future__ import annotations

from torch import Tensor

from ..streaming import RowSelection, SortedTargets
from . import configs, launch
from .kernels import filtered_matmul
from .workspace import Workspace


class TritonFilter:
    """See the protocol ``streaming.engine.DeviceFilter``."""

    def __init__(self, space: Workspace) -> None:
        self._space = space

    def add_rows(
        self, total: Tensor, tile: Tensor, columns: Tensor, selection: RowSelection
    ) -> None:
        space, (count, width) = self._space, total.shape
        config = space.config.filtered
        width_blocks = -(-width // config.block_n)
        blocks = -(-count // config.block_m) * width_blocks
        programs = max(blocks, space.config.wave.split_programs)
        partial = space.partial_products(programs * config.block_m * config.block_n)
        launch.run_tile(
            filtered_matmul.row_products_kernel,
            config,
            programs,
            tile,
            tile.stride(0),
            columns,
            columns.stride(0),
            *selection,
            partial,
            columns.shape[0],
            width,
            PRECISION=space.precision,
        )
        launch.run(
            filtered_matmul.add_row_products_kernel,
            -(-count // configs.SPLIT_ROWS) * width_blocks,
            partial,
            programs,
            *selection,
            space.inverse_scale,
            total,
            width,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            ROWS=configs.SPLIT_ROWS,
            num_warps=configs.VECTOR.num_warps,
        )

    def columns(
        self, tile: Tensor, rows: Tensor, selection: RowSelection, total: Tensor | None = None
    ) -> Tensor:
        space, count, width = self._space, tile.shape[1], rows.shape[1]
        config = space.config.filtered
        out = space.empty((count, width)) if total is None else total
        launch.run_tile(
            filtered_matmul.column_products_kernel,
            config,
            -(-count // config.block_m) * -(-width // config.block_n),
            tile,
            tile.stride(0),
            rows,
            rows.stride(0),
            *selection,
            space.inverse_scale,
            out,
            count,
            width,
            ADD=total is not None,
            EPILOGUE_SUBTILES=config.epilogue_subtiles,
            PRECISION=space.precision,
        )
        return out

    def add_targets(
        self,
        d_unit: Tensor,
        factors: Tensor | None,
        start: int,
        targets: SortedTargets,
        rows: Tensor,
    ) -> None:
        (count, width), config = d_unit.shape, configs.rows(d_unit.shape[1])
        launch.run(
            filtered_matmul.add_targets_kernel,
            len(rows),
            *targets,
            rows,
            rows.stride(0),
            d_unit,
            factors,
            len(rows),
            start,
            count,
            width,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
