"""Tiles of log-sum-exp losses over samples: a launch, and its partial results folded in order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..streaming import NegativeSums, PairSums, PairTile, PairWeights, PositiveSums
from . import launch
from .configs import TileConfig, fewer_pairs
from .kernels import logsumexp_pairs, logsumexp_pairs_gradient
from .logsumexp_tile import merge
from .scaling import set_scale
from .variables import Given, Sums, counts
from .workspace import Workspace, operands


@dataclass
class _Partials:
    """Two results per stretch, of rows and, where the tile serves both directions, of columns."""

    rows: tuple[Tensor | None, Tensor | None]
    columns: tuple[Tensor | None, Tensor | None]
    triangle: bool

    @classmethod
    def of(cls, space: Workspace, config: TileConfig, tile: PairTile, both: bool) -> _Partials:
        count, width = tile.a.shape[0], tile.b.shape[0]
        triangle = _is_triangle(config, tile)
        row_stretches = -(-width // config.block_n) * config.epilogue_subtiles
        rows = (space.empty((row_stretches, count)), space.empty((row_stretches, count)))
        if triangle:
            # Blocks above the diagonal fill the places that those below it would have.
            return cls(rows, rows, True)
        if not both:
            return cls(rows, (None, None), False)
        column_stretches = -(-count // config.block_m) * config.epilogue_subtiles
        shape = (column_stretches, width)
        return cls(rows, (space.empty(shape), space.empty(shape)), False)


def _is_triangle(config: TileConfig, tile: PairTile) -> bool:
    return tile.symmetric and config.block_m == config.block_n


def _programs(config: TileConfig, tile: PairTile) -> int:
    row_blocks = -(-tile.a.shape[0] // config.block_m)
    if _is_triangle(config, tile):
        return row_blocks * (row_blocks + 1) // 2
    return row_blocks * -(-tile.b.shape[0] // config.block_n)


def _with_variables(space: Workspace, tile: PairTile, config: TileConfig) -> TileConfig:
    """Launch of a kernel with variables, which has logits of both directions and derivatives.

    Both passes take one step along D.
    """
    if tile.variables is None:
        return config
    heavy = fewer_pairs(space.config.sum_heavy)
    return replace(heavy, block_k=space.config.sum.block_k)


def _launch(
    space: Workspace,
    kernel: Any,
    config: TileConfig,
    tile: PairTile,
    *arguments: Any,
    **options: Any,
) -> None:
    launch.run_tile(
        kernel,
        config,
        _programs(config, tile),
        *operands(tile.a, tile.b),
        0 if tile.diagonal is None else tile.diagonal,
        tile.a_labels,
        tile.b_labels,
        *arguments,
        space.params,
        **counts(tile.variables),
        TRIANGLE=_is_triangle(config, tile),
        EXCLUDE=tile.diagonal is not None,
        EPILOGUE_SUBTILES=config.epilogue_subtiles,
        PRECISION=space.precision,
        **options,
    )


def negatives(
    space: Workspace,
    tile: PairTile,
    rows: NegativeSums | PairSums,
    columns: NegativeSums | PairSums | None,
) -> None:
    """See ``Engine.pair_negatives_tile`` and ``Engine.pair_sums_tile``."""
    two, both = isinstance(rows, PairSums), columns is not None
    config = space.config.pair_sums if two else space.config.sum
    config = _with_variables(space, tile, config)
    kinds = [_Partials.of(space, config, tile, both) for _ in range(1 + two)]
    of_positives = kinds[1] if two else _Partials((None, None), (None, None), False)
    _launch(
        space,
        logsumexp_pairs.pair_negatives_kernel,
        config,
        tile,
        *kinds[0].rows,
        *of_positives.rows,
        *kinds[0].columns,
        *of_positives.columns,
        *Given.of(tile.variables),
        NEGATIVE=space.pairs_policy.negative,
        POSITIVE=space.pairs_policy.positive if two else None,
        BOTH=both,
    )
    for partials, sums in zip(kinds, _by_kind(rows), strict=True):
        _merge(partials.rows, sums)
    if columns is not None:
        for partials, sums in zip(kinds, _by_kind(columns), strict=True):
            _merge(partials.columns, sums)


def _by_kind(sums: NegativeSums | PairSums) -> tuple[NegativeSums, ...]:
    """Sums of the negatives and, if there are any, of the positives."""
    return (sums.negatives, sums.positives) if isinstance(sums, PairSums) else (sums,)


def _merge(partials: tuple[Tensor | None, Tensor | None], sums: NegativeSums) -> None:
    maximum, total = partials
    assert maximum is not None
    assert total is not None
    merge(maximum, total, sums)


def positives(
    space: Workspace, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
) -> None:
    """See ``Engine.pair_positives_tile``."""
    # With Triton 3.6 it fits no fewer registers: without a number, ptxas takes 128 and a stack.
    config = replace(space.config.sum, max_registers=255)
    config = _with_variables(space, tile, config)
    partials = _Partials.of(space, config, tile, columns is not None)
    _launch(
        space,
        logsumexp_pairs.pair_positives_kernel,
        config,
        tile,
        rows.log_negatives,
        # On the diagonal the columns are the rows.
        rows.log_negatives if columns is None else columns.log_negatives,
        *partials.rows,
        *partials.columns,
        *Given.of(tile.variables),
        POSITIVE=space.pairs_policy.positive,
        BOTH=columns is not None,
    )
    _add(partials.rows, rows)
    if columns is not None:
        _add(partials.columns, columns)


def _add(partials: tuple[Tensor | None, Tensor | None], sums: PositiveSums) -> None:
    loss, negative_prob = partials
    assert loss is not None
    assert negative_prob is not None
    sums.loss.add_(loss.sum(0))
    sums.negative_prob.add_(negative_prob.sum(0))


def gradient(
    space: Workspace, tile: PairTile, rows: PairWeights, columns: PairWeights | None
) -> Tensor:
    """See ``Engine.pair_gradient_tile``."""
    policy = space.pairs_policy
    # The step of the statistics: their cosines to the last bit. exp(z - N) would show a difference
    # in the order of summation, times the scale.
    heavy = space.config.sum_heavy
    # It keeps less than the kernels of sums: subtiles of 16 columns do.
    subtiles = min(heavy.epilogue_subtiles, heavy.block_n // 16)
    config = replace(heavy, block_k=space.config.sum.block_k, epilogue_subtiles=subtiles)
    config = _with_variables(space, tile, config)
    result = space.gradient_tile(tile.a.shape[0], tile.b.shape[0])
    mirrored = columns is not None
    set_scale(space, 1 + mirrored, tile.variables)
    found, triangle = tile.d_variables, _is_triangle(config, tile)
    both, sums = found is not None and found.b_rows is not None, Sums()
    if found is not None:
        sums = Sums.of(
            space,
            (config, _programs(config, tile)),
            (len(tile.a), len(tile.b)),
            (len(found.scalars), len(found.a_rows), len(found.b_columns)),
            both,
            triangle,
        )
    _launch(
        space,
        logsumexp_pairs_gradient.pair_gradient_kernel,
        config,
        tile,
        *rows,
        *(rows if columns is None else columns),
        result,
        result.stride(0),
        space.scale,
        *Given.of(tile.variables),
        *sums,
        NEGATIVE=policy.negative,
        POSITIVE=policy.positive,
        SLOPES=found is not None,
        BOTH=both,
        MIRRORED=mirrored,
    )
    if found is not None:
        sums.add_to(found, triangle)
    return result
