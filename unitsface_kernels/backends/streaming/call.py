"""One call of a fused operator, as the drivers receive it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ... import validate
from ...losses import REGISTRY, LossSpec
from ..dense import dense
from .ranks import Ranks
from .shards import Shards


@dataclass
class Kept:
    """What a forward pass may leave to the backward passes of the same call, beside its state.

    Attributes:
        cosines: (M or K, D) float32, in whose memory lie cosines until the first backward pass
            takes it for the gradient of the columns.
        tile_sums: (tiles, N) float32 sums of every tile of columns, as maximum and total.
        blocks: rows and columns of the tiles of both.
    """

    blocks: tuple[int, int] = (0, 0)
    cosines: Tensor | None = None
    tile_sums: tuple[Tensor, Tensor] | None = None
    _scratch: Tensor | None = None

    def scratch(self, size: int, like: Tensor) -> Tensor:
        """(size,) float32 that the next caller overwrites."""
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = like.new_empty(size)
        return self._scratch[:size]

    def take_cosines(self) -> Tensor | None:
        cosines, self.cosines = self.cosines, None
        return cosines


@dataclass(frozen=True)
class Call:
    """Validated arguments; tensors are dense, of the shapes below, and on one device.

    Attributes:
        rows: (N, D) features.
        row_labels: (N,) int64. Pair topology: identity, -1 ignored. Class topology: position of
            the target among the columns, -1 ignored, -2 no target in this shard.
        columns: (M, D) memory or class weights; None: the batch itself, pair (i, i) excluded.
        column_labels: (M,) int64 identities, -1 neither positive nor negative; None for classes.
        column_index: (K,) int64 rows of ``columns`` that take part; None: all.
        self_offset: the pair of row i and column i + self_offset is left out: 0 in-batch, else the
            place of the batch in a memory that holds it; None: no pair is.
        threshold: (1,) or, for ``spec.threshold == "per_column"``, one per identity or column.
        reduction: "mean", "sum" or "none".
        compute_dtype: operands of the matrix products; they accumulate in float32.
        skip_tolerance: bound of what ``filtering.py`` may leave out of the gradients; 0: nothing.
        kept: for more than the state to pass from forward to backward; None: nothing can.
        shards: the columns are this rank's part of the classes; None: they are all there are.
        sink: takes the gradient of the columns, a (m, D) float32 tile at a time that it may
            overwrite, in place of one gradient of them all.
        ranks: the batches of other ranks; None: there are none. Without ``columns``, columns are
            then the rows of all ranks: ``column_labels`` and thresholds are theirs, and
            ``self_offset`` is the place of the own rows among them.
    """

    spec: LossSpec
    params: tuple[float, ...]
    rows: Tensor
    row_labels: Tensor
    columns: Tensor | None
    column_labels: Tensor | None
    column_index: Tensor | None
    self_offset: int | None
    threshold: Tensor | None
    reduction: str
    compute_dtype: torch.dtype
    skip_tolerance: float
    need_rows: bool
    need_columns: bool
    need_threshold: bool
    kept: Kept | None = None
    shards: Shards | None = None
    sink: ColumnSink | None = None
    ranks: Ranks | None = None

    @property
    def num_columns(self) -> int:
        if self.column_index is not None:
            return self.column_index.shape[0]
        if self.columns is None and self.column_labels is not None:
            return self.column_labels.shape[0]
        return (self.rows if self.columns is None else self.columns).shape[0]

    @property
    def skips(self) -> bool:
        # What is left out is added pair by pair to a whole gradient in the end.
        return self.skip_tolerance > 0.0 and self.sink is None

    @property
    def need_any(self) -> bool:
        return self.need_rows or self.need_columns or self.need_threshold

    @cached_property
    def pair_counts(self) -> tuple[Tensor, Tensor]:
        """(N,) int64 numbers of positives and of negatives of each row, 0 if it is ignored.

        By sorting, without the N x M comparison and without a host sync.
        """
        labels = self.row_labels
        if self.spec.topology == "class":
            positives = (labels >= 0).to(torch.int64)
            return positives, torch.where(labels == -1, 0, self.num_columns - positives)
        others = labels if self.column_labels is None else self.column_labels
        ordered = others.sort().values
        first = torch.searchsorted(ordered, labels)
        positives = torch.searchsorted(ordered, labels, right=True) - first
        negatives = (others >= 0).sum() - positives
        if self.self_offset is not None and labels.numel() and others.numel():
            place = torch.arange(labels.numel(), device=labels.device) + self.self_offset
            inside = (place >= 0) & (place < others.numel())
            left_out = torch.where(inside, others[place.clamp(0, others.numel() - 1)], -1)
            positives = positives - (left_out == labels).to(torch.int64)
            negatives = negatives - ((left_out >= 0) & (left_out != labels)).to(torch.int64)
        return positives.masked_fill(self.ignored, 0), negatives.masked_fill(self.ignored, 0)

    @cached_property
    def ignored(self) -> Tensor:
        """(N,) bool."""
        return self.row_labels == -1

    @cached_property
    def may_have_ignored(self) -> bool:
        """Where looking would wait for a device it is true."""
        return self.row_labels.is_cuda or bool(self.ignored.any())

    @cached_property
    def counted_rows(self) -> Tensor:
        """(N,) bool: rows that have a loss; no host sync."""
        if self.spec.counted == "labeled":
            return ~self.ignored
        positives, negatives = self.pair_counts
        return (positives if self.spec.counted == "with_positives" else negatives) > 0

    def counted(self) -> Tensor:
        """Number of rows, of all ranks, that have a loss, at least 1; () float32, no host sync."""
        if self.ranks is not None:
            return self.ranks.counted
        return self.counted_rows.sum().clamp(min=1).to(torch.float32)


def make_call(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    self_offset: int | None,
    threshold: Tensor | None,
    loss: str,
    params: Sequence[float],
    reduction: str,
    compute_dtype: torch.dtype,
    skip_tolerance: float,
    need_rows: bool,
    need_columns: bool,
    need_threshold: bool,
    kept: Kept | None = None,
    shards: Shards | None = None,
    sink: ColumnSink | None = None,
) -> Call:
    """A :class:`Call` of tensors as autograd has them: of any strides, integer types, graph.

    Kernels read raw memory: what they may rely on is made true here, for all of them.
    """
    column_index = _labels(column_index)
    if column_index is not None and column_index.is_cuda:
        assert columns is not None
        # The error for an index out of range comes later, see ``validate.in_range``.
        column_index = column_index.clamp(0, max(columns.shape[0] - 1, 0))
    if self_offset is not None and columns is not None:
        # Beyond either end no pair is left out; kernels add 64-bit integers to it.
        self_offset = max(-rows.shape[0], min(self_offset, columns.shape[0]))
    call = Call(
        REGISTRY[loss],
        tuple(params),
        dense(rows),
        dense(row_labels.to(torch.int64)),
        None if columns is None else dense(columns),
        _labels(column_labels),
        column_index,
        self_offset,
        None if threshold is None else dense(threshold.to(torch.float32).reshape(-1)),
        reduction,
        compute_dtype,
        skip_tolerance,
        need_rows,
        need_columns,
        need_threshold,
        kept,
        shards,
        sink,
    )
    validate.packed(call.params, len(call.spec.parameters))
    validate.operands(
        call.rows,
        call.row_labels,
        call.columns,
        call.column_labels,
        call.column_index,
        call.threshold,
        call.num_columns if call.spec.threshold == "per_column" else 1,
    )
    return call


def _labels(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else dense(tensor.to(torch.int64))


def not_finite(call: Call, inverse_norms: Tensor) -> Tensor:
    """(N,) float32: NaN for a row whose features or thresholds are not finite, else 0.

    Added to the rows' losses, it is what such a row has where there is no pair to say so: no other
    sample, no negatives, an empty memory, or an infinite threshold that makes a term 0. The sum of
    an ignored row is for the caller to clear, once: its terms may be NaN as well.

    Args:
        inverse_norms: (N,) of :meth:`Engine.normalize_rows` of the rows.
    """
    doubtful = inverse_norms
    if call.threshold is not None:
        thresholds = call.threshold
        if call.spec.threshold == "per_column" and call.spec.topology == "pair":
            labels = call.row_labels if call.column_labels is None else call.column_labels
            thresholds = torch.where(labels >= 0, thresholds, 0.0)
        # One number as it is: on a GPU launches count. The sum of many could overflow.
        one = thresholds if call.spec.threshold == "scalar" else (thresholds * 0.0).sum()
        doubtful = doubtful + one
    return doubtful * 0.0


def clear_ignored(call: Call, of_rows: Tensor) -> None:
    """Ignored rows of an (N, D) or (N,) tensor become 0: their features may be NaN, as 0 times it
    is. Most calls need no pass over the tensor.
    """
    if call.may_have_ignored:
        of_rows.masked_fill_(call.ignored if of_rows.dim() == 1 else call.ignored[:, None], 0.0)


def split_weights(call: Call, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """(N,) upstream gradients as factors of at most 1 and a common scale (), or unchanged.

    Gradient tiles in float16 would overflow under loss scaling; the scale is applied in float32
    when the rows' gradients are finished.
    """
    everyone = weights
    if call.ranks is not None and call.ranks.weights is not None:
        everyone = call.ranks.weights
    if call.compute_dtype != torch.float16 or everyone.numel() == 0:
        return weights, None
    scale = everyone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return weights / scale, scale


@dataclass
class Result:
    """What a forward pass returns; gradients are float32, for an upstream gradient of one.

    Attributes:
        loss: () or, with ``reduction="none"``, (N,) float32.
        state: what the backward pass needs of it, (``state_rows``, N) float32; None for sum.
        gradients: of the rows (N, D), the columns (M or K, D) and the threshold; None where not
            needed or not known yet.
    """

    loss: Tensor
    state: Tensor | None
    gradients: Gradients


ColumnSink = Callable[[slice, Tensor], None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
