"""Interface of a backend to the drivers: the work on one tile.

A tile compares n rows with m columns. ``tiles.py`` has their order. Drivers (``sum.py``,
``logsumexp.py``) own accumulation over tiles and everything of size N; engines own everything of
size n x m, and the GEMMs. Nothing here or in the drivers depends on a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .call import Call
from .reductions import ClassSums, Reductions
from .selection import DeviceFilter, RowSelection
from .values import TargetWeights, TileVariables, Variables


@dataclass
class SumTile:
    """Arguments of :meth:`Engine.sum_tile`.

    Attributes:
        a, b: (n, D), (m, D) unit rows and columns from :meth:`Engine.normalize_rows`. Of columns of
            K vectors each (:attr:`Call.centers`) ``b`` is (m K, D), and so are tiles of gradients
            (n, m K): see ``centers.py``.
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
        total: only the total of all rows is wanted, as with a reduction, without weights, and
            with one threshold for all pairs. ``a_loss``, ``b_loss`` (the same tensor, or None) and
            ``d_threshold`` are then (:attr:`Engine.total_slots`,) numbers, whose sums count.
        a_start, b_start: position of the tile in the whole matrix.
        diagonal: the pair (i, i + diagonal) of the tile is left out; None: no pair is.
        mirrored: gradients count both directions of each pair (in-batch symmetry). Without
            ``b_loss``, losses and the threshold's gradient are still those of the rows alone: on
            the diagonal the same tile, and against rows of another rank that rank, has the other
            direction.
        gradient: whether d loss / d cosine is wanted.
        variables: of the formula, float32; None: it reads none.
        d_variables: accumulates their gradients; None if not needed. That of the other direction
            only with ``b_loss``.
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
    diagonal: int | None
    mirrored: bool
    gradient: bool
    total: bool = False
    variables: TileVariables | None = None
    d_variables: TileVariables | None = None


@dataclass
class PairTile:
    """Pairs of a tile of a ``logsumexp`` or ``logsumexps`` loss over samples.

    Attributes:
        a, b, a_labels, b_labels, diagonal: as of :class:`SumTile`.
        symmetric: ``a`` and ``b`` are the same rows of a batch: the tile is its own mirror image,
            and its rows have both directions of every pair.
        variables: that logits read, float32; None: they read none. Of a tile that serves its
            columns, or is symmetric, or has a gradient of both directions, ``b_rows`` and
            ``a_columns`` are given: the logit of the other direction of pair (i, j) reads these.
        d_variables: accumulates their gradients in :meth:`Engine.pair_gradient_tile`: of both
            directions if it has ``b_rows`` and ``a_columns``; else of the rows' direction alone,
            although cosines have the gradient of both. A symmetric tile has the other direction
            itself, and of rows of another rank that rank has it. None if not needed.
    """

    a: Tensor
    b: Tensor
    a_labels: Tensor
    b_labels: Tensor
    diagonal: int | None
    symmetric: bool
    variables: TileVariables | None = None
    d_variables: TileVariables | None = None


@dataclass
class ClassTile:
    """Pairs of a tile of a ``logsumexp`` or ``nearest`` loss over classes.

    Attributes:
        a: as of :class:`SumTile`.
        b: (m, D) :attr:`TileColumns.matrix`; of columns of several vectors, as :class:`SumTile`.
        targets: (n,) int64 positions among all columns; of a target outside the tile nothing
            is known here.
        start: position of the tile's first column.
        cosines: (n, m) float32, of columns of several vectors (n, m K), where a first pass leaves
            all cosines for the second, which may overwrite them; None: nowhere, the second pass
            multiplies again.
        b_factors: (m,) :attr:`TileColumns.factors`.
        selection: rows for which a gradient is wanted, the others are not written; None: all.
        variables: that the negatives' logits read, as of :class:`SumTile`.
        d_variables: accumulates the gradients of the negatives: of scalars by row, (S, n), (R, n)
            and (C, m); None if not needed.
    """

    a: Tensor
    b: Tensor
    targets: Tensor
    start: int
    cosines: Tensor | None = None
    b_factors: Tensor | None = None
    selection: RowSelection | None = None
    variables: TileVariables | None = None
    d_variables: TileVariables | None = None


class TileColumns(NamedTuple):
    """A block of columns as the tiles against it multiply them.

    Attributes:
        matrix: (m, D) in the dtype of the GEMMs: the columns at unit length, or as they are.
        inverse_norms: (m,) float32, as of :meth:`Engine.normalize_rows`.
        raw: they are as they are. A product with a unit row times the column's inverse norm is
            then the cosine, and a gradient tile has that factor as well: multiplied by ``matrix``
            it gives the gradient of the rows, and its product with the rows is the gradient of
            the unit columns times their inverse norms.
    """

    matrix: Tensor
    inverse_norms: Tensor
    raw: bool = False

    @property
    def factors(self) -> Tensor | None:
        """(m,) of every product with ``matrix``; None: ones."""
        return self.inverse_norms if self.raw else None


class NegativeSums(NamedTuple):
    """Running ``maximum`` of the negatives' logits and ``total`` = sum exp(z - maximum)."""

    maximum: Tensor
    total: Tensor


class PositiveSums(NamedTuple):
    """Sums over positives of softplus and sigmoid of N - z; N = ``log_negatives`` is given.

    The sigmoid is the negatives' probability in a softmax with the positive.
    """

    log_negatives: Tensor
    loss: Tensor
    negative_prob: Tensor


class PairSums(NamedTuple):
    """:class:`NegativeSums`, and the same of the positives' logits."""

    maximum: Tensor
    total: Tensor
    positive_maximum: Tensor
    positive_total: Tensor

    @property
    def negatives(self) -> NegativeSums:
        return NegativeSums(self.maximum, self.total)

    @property
    def positives(self) -> NegativeSums:
        return NegativeSums(self.positive_maximum, self.positive_total)


class PairWeights(NamedTuple):
    """Per-row factors of the gradient.

    A negative has ``negative exp(z - N) dz/dc``, N = ``log_negatives``, and a positive
    ``-positive sigmoid(N - z) dz/dc`` or, of a ``logsumexps`` loss, ``positive exp(z - P) dz/dc``,
    P = ``log_positives``. A row that takes no part has +inf and zero weights.
    """

    log_negatives: Tensor
    negative: Tensor
    positive: Tensor
    log_positives: Tensor | None = None


class ClassWeights(NamedTuple):
    """Per-row factors of the gradient.

    A negative has ``negative exp(z - N) dz/dc``, N = ``log_negatives``; the target ``target``.
    """

    log_negatives: Tensor
    negative: Tensor
    target: Tensor


class Nearest(NamedTuple):
    """The k largest cosines of each row so far, and its target's.

    ``best`` (n, k) float32 in descending order, ``position`` (n, k) int32 among all columns;
    unfilled: -inf and -1. ``target_cosine`` (n,).
    """

    best: Tensor
    position: Tensor
    target_cosine: Tensor


Vectors = TypeVar(
    "Vectors", NegativeSums, PositiveSums, PairSums, PairWeights, ClassSums, ClassWeights, Nearest
)


def part(vectors: Vectors, rows: slice | Tensor) -> Vectors:
    """The same vectors for some rows."""
    if isinstance(rows, slice) and rows == slice(0, vectors[0].shape[0]):
        return vectors
    some: list[Any] = [None if vector is None else vector[rows] for vector in vectors]
    return type(vectors)(*some)


class Engine(Reductions, Protocol):
    """Tile work of one backend on one device, for one call."""

    @property
    def sum_block(self) -> tuple[int, int]:
        """Rows and columns of an in-batch tile; equal."""

    @property
    def class_block(self) -> tuple[int, int]:
        """Rows and columns of a tile against a memory or classes, whole ones whatever their
        vectors.
        """

    @property
    def stat_dtype(self) -> torch.dtype:
        """Accumulators of losses and of the threshold's gradient."""

    @property
    def total_slots(self) -> int:
        """Numbers that :attr:`SumTile.total` accumulates; 0: tiles have sums per row only."""

    @property
    def keeps_cosines(self) -> bool:
        """Whether :attr:`ClassTile.cosines` is of use.

        Worth it where memory is not much slower than GEMMs.
        """

    @property
    def device_filter(self) -> DeviceFilter | None:
        """Gradient filtering decided on the device; None: the host decides, and waits for it."""

    def __init__(self, call: Call) -> None: ...

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Identities as the tile kernels take them; equal stays equal, -1 stays -1."""

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
            (n, D) unit rows in the dtype of the GEMMs, and (n,) float32 inverse norms,
            where a norm below 1e-5 counts as 1e-5. With ``reuse`` (a tile of columns) they may
            lie in a workspace that the next such call overwrites; else they last for the call.
        """

    def tile_columns(
        self, source: Tensor, start: int, stop: int, index: Tensor | None = None
    ) -> TileColumns:
        """Rows ``start:stop`` of ``source`` (of ``source[index]``) as the columns of tiles.

        Valid until the next call. For :class:`ClassTile` only: whether they are raw is the
        engine's choice.
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
        raw: bool = False,
    ) -> None:
        """``out`` = gradient of the raw rows: ``r (g - <g, u> u)`` times ``scale`` (()).

        A clamped norm is constant, so its row has no ``<g, u> u``. ``out`` may be ``d_unit``,
        which is g, or with ``raw`` (see :class:`TileColumns`) r g.
        """

    def update_columns(
        self,
        call: Call,
        part: slice,
        d_unit: Tensor,
        inverse_norms: Tensor,
        scale: Tensor | None,
        raw: bool,
    ) -> bool:
        """:meth:`normalize_rows_backward` of the columns in ``part``, and the step of ``call.sink``
        on them, without their gradient in between.

        Returns:
            Whether the engine has made it; else nothing is done.
        """

    def unit_rows(self, call: Call) -> tuple[Tensor, Tensor]:
        """:meth:`normalize_rows` of a call's rows; ignored ones, which may be NaN, are 0."""

    def unit_rows_backward(
        self, call: Call, d_unit: Tensor, inverse_norms: Tensor, scale: Tensor | None
    ) -> None:
        """:meth:`normalize_rows_backward` of a call's rows, in place; ignored ones are 0."""

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        """One tile of a ``sum`` loss; returns (n, m) d loss / d cosine, if wanted.

        The result is valid until the next tile.
        """

    def logsumexp_tile(self, tile: ClassTile, rows: ClassSums) -> None:
        """The sums of a tile's negatives, in place of those of :meth:`class_sums`, of none.

        A target inside the tile is left out of the sum, and its cosine stored.
        """

    def finish_rows(
        self, call: Call, sums: ClassSums, values: Variables | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (N,) of all rows of a ``logsumexp`` loss over classes, and the state
        (``logsumexp.state_rows``, N): N, probability of the negatives in the softmax, d logit / d
        cosine of the target.

        ``logsumexp.finish_rows`` makes them of Torch operators.

        Args:
            call: the call.
            sums: of every row, by blocks of columns: (blocks, N), (blocks, N), (N,).
            values: all variables; None: the formula reads none.
        """

    def row_slopes(self, call: Call, values: Variables, weights: TargetWeights) -> Tensor:
        """(V, N) d loss of each row / d each variable, through targets and regularizers.

        ``row_formulas.row_slopes`` makes them of Torch operators.
        """

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        """(n, m) d loss / d cosine, valid until the next tile."""

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        """Folds a tile's negatives into the sums of its rows, and of its columns if given."""

    def pair_sums_tile(self, tile: PairTile, rows: PairSums, columns: PairSums | None) -> None:
        """Folds a tile's negatives and positives into the sums of its rows, and of its columns."""

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

    def nearest_tile(self, tile: ClassTile, rows: Nearest) -> None:
        """Folds a tile into each row's k largest cosines with columns other than its target.

        Of equal cosines the smaller position comes first, and tiles come in ascending order of
        ``start``. NaN counts as larger than every number. Targets as for :meth:`logsumexp_tile`.
        """

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right`` in float32, for a tile's gradient and unit rows."""

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` in float32, valid until the next call."""

    def both_products(
        self, tile: Tensor, a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor | None
    ) -> Tensor:
        """``d_a += tile @ b`` and ``d_b += tile.T @ a``, which do not overlap, of a gradient tile.

        Returns:
            ``d_b``; if it is None, the product as of :meth:`matmul`.
        """

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        """Sums over ``dim`` of the absolute values of a gradient tile, float32."""

    def entries(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values (k,) of a gradient tile at (k,) places, float32."""
