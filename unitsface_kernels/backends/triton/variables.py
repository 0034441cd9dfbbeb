"""Variables of a tile as kernels take them, and memory for sums of derivatives by them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..streaming import TileVariables
from .configs import TileConfig
from .workspace import Workspace


class Given(NamedTuple):
    """Arguments of kernels over pairs, in their order; None where there are no variables."""

    scalars: Tensor | None = None
    a_rows: Tensor | None = None
    b_rows: Tensor | None = None
    row_stride: int = 0
    a_columns: Tensor | None = None
    b_columns: Tensor | None = None
    column_stride: int = 0

    @classmethod
    def of(cls, variables: TileVariables | None) -> Given:
        if variables is None:
            return cls()
        scalars, a_rows, b_columns, b_rows, a_columns = (
            values if values is not None and len(values) else None for values in variables
        )
        row_stride, column_stride = variables.a_rows.stride(0), variables.b_columns.stride(0)
        return cls(scalars, a_rows, b_rows, row_stride, a_columns, b_columns, column_stride)


def counts(variables: TileVariables | None) -> dict[str, int]:
    """Constants of kernels: how many variables of each kind there are."""
    found = (0, 0, 0) if variables is None else [len(values) for values in variables[:3]]
    return dict(zip(("SCALARS", "ROWS", "COLUMNS"), found, strict=True))


class Sums(NamedTuple):
    """Partial sums, see ``sum_variables_kernel``; None: there are none."""

    scalars: Tensor | None = None
    a_rows: Tensor | None = None
    b_rows: Tensor | None = None
    a_columns: Tensor | None = None
    b_columns: Tensor | None = None

    @classmethod
    def of(
        cls,
        space: Workspace,
        launch: tuple[TileConfig, int],
        sizes: tuple[int, int],
        wanted: tuple[int, int, int],
        both: bool,
        triangle: bool,
    ) -> Sums:
        """Memory.

        Args:
            space: of the call.
            launch: configuration and number of programs.
            sizes: rows and columns of the tile.
            wanted: numbers of sums over all pairs, of rows, and of columns.
            both: the other direction has sums of its own.
            triangle: blocks above the diagonal fill the places that those below it would have: both
                directions are the same memory.
        """
        (config, programs), (count, width) = launch, sizes
        scalars, rows, columns = wanted

        def partial(planes: int, size: int, of: int, block: int) -> Tensor | None:
            """Memory for ``size`` sums of each stretch of ``of`` others in blocks of ``block``."""
            if not planes:
                return None
            shape = (planes, -(-of // block) * config.epilogue_subtiles, size)
            # Stretches past the end are not written.
            return space.empty(shape)[:, : -(-of * config.epilogue_subtiles // block)]

        of_scalars = space.empty((scalars, programs)) if scalars else None
        a_rows = partial(rows, count, width, config.block_n)
        b_columns = partial(columns, width, count, config.block_m)
        if triangle:
            return cls(of_scalars, a_rows, a_rows, b_columns, b_columns)
        if not both:
            return cls(of_scalars, a_rows, None, None, b_columns)
        b_rows = partial(rows, width, count, config.block_m)
        return cls(
            of_scalars, a_rows, b_rows, partial(columns, count, width, config.block_n), b_columns
        )

    def add_to(self, found: TileVariables, triangle: bool) -> None:
        """Adds everything up, in a fixed order, to the gradients of the variables."""
        directions: list[tuple[Tensor | None, Tensor | None]]
        directions = [(found.a_rows, self.a_rows), (found.b_columns, self.b_columns)]
        if not triangle:
            directions += [(found.b_rows, self.b_rows), (found.a_columns, self.a_columns)]
        for total, partial in ((found.scalars, self.scalars), *directions):
            if total is not None and partial is not None:
                total.add_(partial.sum(1))
