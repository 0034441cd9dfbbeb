"""Tiles of classes with several centers: cosines go to memory, for the other kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ..streaming import ClassTile, SumTile
from . import configs, launch
from .kernels import centers
from .workspace import Workspace, operands

Tile = TypeVar("Tile", SumTile, ClassTile)


def reduced(space: Workspace, tile: Tile) -> Tile:
    """A tile with the cosines of its columns (n, m) as ``a``, and (m, 0) ``b``.

    The larger part of the work of its kernels is then done: a program per block of classes
    multiplies the rows with the first center of each, then with the second, and keeps the largest.
    """
    count = space.call.centers
    if count == 1:
        return tile
    rows, columns = len(tile.a), len(tile.b) // count
    cosines, which = space.largest_tile(rows, columns)
    config = space.config.centers
    a, b, a_stride, b_stride, _, _, depth = operands(tile.a, tile.b)
    launch.run_tile(
        centers.largest_kernel,
        config,
        -(-rows // config.block_m) * -(-columns // config.block_n),
        *(a, b, a_stride, b_stride, rows, columns, depth),
        count,
        cosines,
        which,
        cosines.stride(0),
        PRECISION=space.precision,
    )
    return replace(tile, a=cosines, b=cosines.new_empty((columns, 0)))


def spread(space: Workspace, gradient: Tensor) -> Tensor:
    """The gradient (n, m) of the cosines of the last tile as that of all centers, (n, m K)."""
    count = space.call.centers
    if count == 1:
        return gradient
    rows, columns = gradient.shape
    _, which = space.largest_tile(rows, columns)
    out = space.gradient_tile(rows, columns * count, "spread")
    config = configs.rows(columns * count)
    launch.run(
        centers.spread_kernel,
        -(-rows // config.rows) * -(-columns * count // config.block),
        gradient,
        gradient.stride(0),
        which,
        which.stride(0),
        out,
        out.stride(0),
        rows,
        columns,
        count,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return out
