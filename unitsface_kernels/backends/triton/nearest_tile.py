"""Tiles of the search for nearest wrong columns."""

from __future__ import annotations

from torch import Tensor, int32, int64

from . import configs, launch
from .kernels import nearest
from .workspace import Workspace, operands

#: Candidates of one launch. For a large k they would outgrow the product tile: it then takes
#: several launches, of which the later ones find few.
CANDIDATE_BYTES = 1 << 25


def search(
    space: Workspace,
    a: Tensor,
    b: Tensor,
    targets: Tensor,
    start: int,
    best: Tensor,
    position: Tensor,
    target_cosine: Tensor,
) -> None:
    """See ``Engine.nearest_tile``."""
    config = space.config.nearest
    of_block = 8 * max(a.shape[0], 1) * best.shape[1]
    step = max(CANDIDATE_BYTES // of_block, 1) * config.block_n
    for first in range(0, b.shape[0], step):
        columns = b[first : first + step]
        _search(space, a, columns, targets, start + first, best, position, target_cosine)


def _search(
    space: Workspace,
    a: Tensor,
    b: Tensor,
    targets: Tensor,
    start: int,
    best: Tensor,
    position: Tensor,
    target_cosine: Tensor,
) -> None:
    config = space.config.nearest
    rows, columns, count = a.shape[0], b.shape[0], best.shape[1]
    row_blocks = -(-rows // config.block_m)
    column_blocks = -(-columns // config.block_n)
    candidates = space.empty((column_blocks * count, rows), int64)
    found = space.empty((column_blocks, rows), int32)
    launch.run_product(
        nearest.nearest_kernel,
        config,
        row_blocks * column_blocks,
        *operands(a, b),
        targets,
        start,
        best,
        count,
        candidates,
        found,
        target_cosine,
        PRECISION=space.precision,
    )
    slots = max(1 << (count - 1).bit_length(), 2)
    merge = configs.merge_nearest(slots)
    launch.run(
        nearest.merge_nearest_kernel,
        -(-rows // merge.rows),
        candidates,
        found,
        best,
        position,
        column_blocks,
        rows,
        count,
        ROWS=merge.rows,
        SLOTS=slots,
        BLOCK=merge.block,
        num_warps=merge.num_warps,
    )
