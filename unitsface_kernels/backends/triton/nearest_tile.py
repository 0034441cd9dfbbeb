"""Tiles of the search for nearest wrong columns."""

from __future__ import annotations

from dataclasses import replace

from torch import int32, int64

from ..streaming import ClassTile, Nearest
from . import configs, launch
from .kernels import nearest
from .workspace import Workspace, operands

#: Candidates of one launch. For a large k they would outgrow the tile of cosines: it then takes
#: several launches, of which the later ones find few.
CANDIDATE_BYTES = 1 << 25


def search(space: Workspace, tile: ClassTile, rows: Nearest) -> None:
    """See ``Engine.nearest_tile``."""
    # Of columns without numbers the rows are their cosines.
    given = not tile.b.shape[1]
    config = space.config.centers if given else space.config.nearest
    of_block = 8 * max(tile.a.shape[0], 1) * rows.best.shape[1]
    step = max(CANDIDATE_BYTES // of_block, 1) * config.block_n
    for first in range(0, tile.b.shape[0], step):
        part = slice(first, first + step)
        factors = None if tile.b_factors is None else tile.b_factors[part]
        columns = replace(tile, b=tile.b[part], b_factors=factors, start=tile.start + first)
        if given:
            columns.a = tile.a[:, part]
        _search(space, config, columns, rows)


def _search(space: Workspace, config: configs.TileConfig, tile: ClassTile, found: Nearest) -> None:
    rows, columns, count = tile.a.shape[0], tile.b.shape[0], found.best.shape[1]
    row_blocks = -(-rows // config.block_m)
    column_blocks = -(-columns // config.block_n)
    candidates = space.empty((column_blocks * count, rows), int64)
    sizes = space.empty((column_blocks, rows), int32)
    launch.run_tile(
        nearest.nearest_kernel,
        config,
        row_blocks * column_blocks,
        *operands(tile.a, tile.b),
        tile.b_factors,
        tile.targets,
        tile.start,
        found.best,
        count,
        candidates,
        sizes,
        found.target_cosine,
        PRECISION=space.precision,
    )
    slots = max(1 << (count - 1).bit_length(), 2)
    merge = configs.merge_nearest(slots)
    launch.run(
        nearest.merge_nearest_kernel,
        -(-rows // merge.rows),
        candidates,
        sizes,
        found.best,
        found.position,
        column_blocks,
        rows,
        count,
        ROWS=merge.rows,
        SLOTS=slots,
        BLOCK=merge.block,
        num_warps=merge.num_warps,
    )
