"""What a backend supplies to the drivers: the work on one tile.

A tile compares n rows with m columns. Drivers (``sum.py``, ``logsumexp.py``) own tiling,
accumulation over tiles and everything of size N; engines own everything of size n x m, and the
products. Nothing here or in the drivers knows a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .call import Call


@dataclass
class SumTile:
    """Arguments of :meth:`Engine.sum_tile`.

    Attributes:
        a, b: (n, D), (m, D) unit rows and columns from :meth:`Engine.normalize_rows`.
        a_labels, b_labels: (n,), (m,) from :meth:`Engine.prepare_labels`; below 0: ignored.
        b_threshold: (1,) or, per column, (m,) float32.
        a_threshold: as ``b_threshold`` for the pairs taken in the other direction; None for a
            tile that serves its rows only.
        a_weights, b_weights: (n,), (m,) float32 upstream gradients of the rows' losses;
            None: ones.
        a_loss: (n,) accumulates each row's loss over this tile's columns.
        b_loss: (m,) accumulates each column's loss over this tile's rows, for tiles that serve
            both directions of a pair; else None.
        d_threshold: accumulates the threshold's gradient, the shape of the whole call's
            threshold: (1,), or (M,) per column; None if not needed.
        a_start, b_start: position of the tile in the whole matrix.
        skip: the pair (i, i + skip) of the tile is left out; None: no pair is.
        mirrored: gradients count both directions of each pair (in-batch symmetry). Without
            ``b_loss``, losses and the threshold's gradient are still those of the rows alone: on
            the diagonal, and against rows of another rank, somebody else has the other direction.
        gradient: whether d loss / d cosine is wanted.
    """

    a: Tensor
    b: Tensor
    a_labels: Tensor
    b_labels: Tensor
    b_threshold: Tensor
    a_threshold: Tensor | None
    a_weights: Tensor | None
    b_weights: Tensor | None
    a_loss: Tensor
    b_loss: Tensor | None
    d_threshold: Tensor | None
    a_start: int
    b_start: int
    skip: int | None
    mirrored: bool
    gradient: bool


@dataclass
class PairTile:
    """Pairs of a tile of a ``logsumexp`` loss over samples.

    Attributes:
        a, b, a_labels, b_labels, skip: as of :class:`SumTile`.
        diagonal: ``a`` and ``b`` are the same rows of a batch: the tile is its own mirror image,
            and its rows have both directions of every pair.
    """

    a: Tensor
    b: Tensor
    a_labels: Tensor
    b_labels: Tensor
    skip: int | None
    diagonal: bool


class NegativeSums(NamedTuple):
    """Running ``maximum`` of the negatives' logits and ``total`` = sum exp(z - maximum)."""

    maximum: Tensor
    total: Tensor

    def part(self, rows: slice) -> NegativeSums:
        return NegativeSums(*(vector[rows] for vector in self))


class PositiveSums(NamedTuple):
    """Sums over positives of softplus and sigmoid of N - z; N = ``log_negatives`` is given."""

    log_negatives: Tensor
    loss: Tensor
    share: Tensor

    def part(self, rows: slice) -> PositiveSums:
        return PositiveSums(*(vector[rows] for vector in self))


class PairWeights(NamedTuple):
    """What a row's gradient needs of it.

    A negative has ``negative exp(z - N) dz/dc`` and a positive ``-positive sigmoid(N - z) dz/dc``,
    N = ``log_negatives``. A row that takes no part has N = +inf and zero weights.
    """

    log_negatives: Tensor
    negative: Tensor
    positive: Tensor

    def part(self, rows: slice) -> PairWeights:
        return PairWeights(*(vector[rows] for vector in self))


class Engine(Protocol):
    """Tile work of one backend on one device, for one call."""

    @property
    def sum_block(self) -> tuple[int, int]:
        """Rows and columns of an in-batch tile; equal."""

    @property
    def class_block(self) -> tuple[int, int]:
        """Rows and columns of a tile against a memory or classes."""

    @property
    def stat_dtype(self) -> torch.dtype:
        """Accumulators of losses and of the threshold's gradient."""

    @property
    def keeps_cosines(self) -> bool:
        """Whether tiles can leave their cosines where they are told to, and take them up there.

        Worth it where memory is not much slower than products.
        """

    def __init__(self, call: Call) -> None: ...

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Identities as the tile kernels want them; equal stays equal, -1 stays -1."""

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Rows ``start:stop`` of ``source`` (of ``source[index]``), divided by their norms.

        Returns:
            (n, D) unit rows in the dtype of the products, and (n,) float32 inverse norms,
            where a norm below 1e-5 counts as 1e-5. With ``reuse`` (a tile of columns) they may
            lie in a buffer that the next such call overwrites; else they last for the call.
        """

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
        """``out`` = gradient of the raw rows: ``r (g - <g, u> u)`` times ``scale`` (()).

        A clamped norm is constant, so its row has no ``<g, u> u``. ``out`` may be ``d_unit``.
        """

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        """One tile of a ``sum`` loss; returns (n, m) d loss / d cosine, if wanted.

        The result is valid until the next tile.
        """

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
        """Folds a tile's negatives into (n,) ``maximum`` and ``total`` = sum exp(z - maximum).

        ``targets`` (n,) are positions among all columns; a target inside the tile is left out
        of the sum and its cosine stored in ``target_cosine`` (n,). All cosines are left in
        ``cosines`` (n, m) float32, if given.
        """

    def positive_rows(self, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Policy of a positive, row by row: logits and d logit / d cosine, both (n,)."""

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
        """(n, m) d loss / d cosine.

        Negatives: ``negative_weight_i exp(z - log_negatives_i) dz/dc``; targets:
        ``target_gradient_i``. Valid until the next tile. ``cosines``: as the first pass left
        them, to be overwritten; None: they are multiplied again.
        """

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        """Folds a tile's negatives into the sums of its rows, and of its columns if given."""

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        """Adds a tile's positives to the sums of its rows, and of its columns if given."""

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        """(n, m) d loss / d cosine, of both directions of a pair if ``columns`` are given.

        Valid until the next tile.
        """

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
        """Folds a tile into each row's k largest cosines with columns other than its target.

        ``best`` (n, k) float32 in descending order, ``position`` (n, k) int32 among all columns;
        unfilled: -inf and -1. Of equal cosines the smaller position comes first, and tiles come
        in ascending order of ``start``. NaN counts as larger than every number. Targets as for
        :meth:`logsumexp_tile`. Knows no loss.
        """

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right`` in float32, for a tile's gradient and unit rows."""

    def overwrite(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` in float32, valid until the next call."""

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        """Sums over ``dim`` of the absolute values of a gradient tile, float32."""

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values (k,) of a gradient tile at (k,) places, float32."""
