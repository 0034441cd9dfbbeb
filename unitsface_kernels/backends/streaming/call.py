"""One call of a fused loss: what autograd receives, and what the drivers receive."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import LossSpec
from ..dense import as_dtype, dense
from .forward_cache import ForwardCache
from .mixing import Mixing
from .other_ranks import Ranks, Towers
from .pair_counts import pair_counts
from .shards import Shards
from .sink import ColumnSink


class Gradients(NamedTuple):
    """Float32 gradients of a call's tensors; None where not needed or not known yet.

    ``rows`` (N, D), ``columns`` (M or K, D) or (M or K, centers, D) as given, ``threshold`` (1,) or
    (M,), ``variables`` as given.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    threshold: Tensor | None = None
    variables: Tensor | None = None


class CallTensors(NamedTuple):
    """Tensors of a call, of any strides and integer types, with their graph.

    Attributes:
        rows: (N, D) features.
        row_labels: (N,). Pair topology: identity, -1 ignored. Class topology: position of the
            target among the columns, -1 ignored, -2 no target in this shard.
        columns: (M, D) memory or class weights; None: the batch itself, pair (i, i) excluded.
            Classes of several centers: (M, centers, D).
        column_labels: (M,) identities, -1 neither positive nor negative; None for classes.
        column_index: (K,) rows of ``columns`` that take part; None: all.
        threshold: one element or, for ``spec.threshold == "per_column"``, one per column.
        variables: the given ones of ``spec.variables`` one after the other: a scalar has one
            element, one of rows N, one of columns as many as take part. One tensor, so that
            autograd, operators and ranks have one more of them, whatever a formula reads. None:
            the formula reads none.
    """

    rows: Tensor
    row_labels: Tensor
    columns: Tensor | None = None
    column_labels: Tensor | None = None
    column_index: Tensor | None = None
    threshold: Tensor | None = None
    variables: Tensor | None = None


@dataclass(frozen=True)
class CallConfig:
    """Static part of a call.

    Attributes:
        params: hyper-parameters as :meth:`LossSpec.pack` has them.
        reduction: "mean", "sum" or "none".
        backend: "reference", "native" or "triton".
        compute_dtype: operands of the matmuls, which accumulate in float32.
        self_offset: the pair of row i and column i + self_offset is left out: 0 in-batch, else the
            place of the batch in a memory that holds it; None: no pair is.
        skip_tolerance: bound of what gradient filtering may leave out; 0: nothing.
        need_rows, need_columns, need_threshold, need_variables: gradients to compute.
        both: pair topology: the columns are a second tower, and pairs count in both directions.
            Columns have losses of their own, against the rows: losses, state and upstream gradients
            are of N rows and then of M columns.
        label_range: the smallest and the largest label of rows and columns; None: not known, as of
            labels that are on a device.
    """

    spec: LossSpec
    params: tuple[float, ...]
    reduction: str
    backend: str
    compute_dtype: torch.dtype
    self_offset: int | None = None
    skip_tolerance: float = 0.0
    need_rows: bool = False
    need_columns: bool = False
    need_threshold: bool = False
    need_variables: bool = False
    both: bool = False
    label_range: tuple[int, int] | None = field(default=None, kw_only=True)

    @property
    def need_any(self) -> bool:
        return self.need_rows or self.need_columns or self.need_threshold or self.need_variables

    @property
    def forward_has_gradients(self) -> bool:
        """Whether the tiles of the forward pass yield the gradients.

        A pair's gradient in a ``sum`` loss needs only that pair. With ``reduction="none"`` the
        rows' weights are known in the backward pass only.
        """
        return self.spec.reduction == "sum" and self.reduction != "none"

    def rows_alone(self, columns: Tensor | None) -> bool:
        """Whether the rows are the only features with a gradient: against a memory, most of all.

        A row's gradient is then that of its own loss, which an upstream gradient scales, and the
        forward pass can compute it. So nothing of the columns is kept for the backward pass, and
        they may change before it.
        """
        return columns is not None and not self.need_columns and not self.both

    def gradients_known(self, columns: Tensor | None) -> bool:
        """Whether every gradient is known after the forward pass, but for its scale."""
        if not self.need_any:
            return False
        if not self.rows_alone(columns):
            return self.forward_has_gradients
        # One threshold or scalar for all rows would need every row's part of its gradient.
        return self.reduction != "none" or not (self.need_threshold or self.need_variables)


@dataclass(frozen=True, kw_only=True)
class Call(CallConfig):
    """A call as the drivers receive it: its static part, its tensors, and what ranks share.

    Tensors are those of :class:`CallTensors`, detached, dense and on one device; labels and
    indices are int64, the threshold is (1,) or (M,) float32, and so are variables. Columns are
    always a matrix: all centers of the first class, then those of the second one.

    Attributes:
        centers: vectors of a column, of whose cosines the largest counts: K of a class, see
            ``centers.py``.
        mixing: rows that are mixed into the columns, and have no gradient; None: there are none.
        cache: passes more than the state from forward to backward; None: nothing can be passed.
        shards: the columns are this rank's part of the classes; None: they are all there are.
        sink: takes the gradient of the columns tile by tile, in place of one gradient of them all.
        ranks: the batches of other ranks; None: there are none. Without ``columns``, columns are
            then the rows of all ranks: ``column_labels`` and thresholds are theirs, and
            ``self_offset`` is the place of the own rows among them.
        towers: with ``both``, the other ranks' rows and columns, which are compared with the own
            columns and rows; None: there are none.
    """

    rows: Tensor
    row_labels: Tensor
    columns: Tensor | None = None
    column_labels: Tensor | None = None
    column_index: Tensor | None = None
    threshold: Tensor | None = None
    variables: Tensor | None = None
    centers: int = 1
    mixing: Mixing | None = None
    cache: ForwardCache | None = None
    shards: Shards | None = None
    sink: ColumnSink | None = None
    ranks: Ranks | None = None
    towers: Towers | None = None

    @property
    def kernel_params(self) -> tuple[float, ...]:
        """See :meth:`LossSpec.kernel_params`, which keeps what it computes."""
        return self.spec.kernel_params(self.params)

    @property
    def num_columns(self) -> int:
        if self.column_index is not None:
            return self.column_index.shape[0]
        if self.columns is None and self.column_labels is not None:
            return self.column_labels.shape[0]
        columns = self.rows if self.columns is None else self.columns
        return columns.shape[0] // self.centers

    @property
    def num_vectors(self) -> int:
        """Vectors of the columns that take part, of each as many as it has centers."""
        return self.num_columns * self.centers

    @property
    def vector_index(self) -> Tensor | None:
        """Rows of ``columns`` of the columns that take part; None: all."""
        return self.column_index if self.centers == 1 else self._vector_index

    @cached_property
    def _vector_index(self) -> Tensor | None:
        index = self.column_index
        if index is None:
            return None
        every = torch.arange(self.centers, device=index.device)
        return (index[:, None] * self.centers + every).flatten()

    def as_columns(self, vectors: Tensor) -> Tensor:
        """(m K, D) of the vectors of m columns as these are given, (m, K, D) with several."""
        if self.centers == 1:
            return vectors
        return vectors.unflatten(0, (len(vectors) // self.centers, self.centers))

    @property
    def num_losses(self) -> int:
        """Number of losses: one per row, and with ``both`` one per column."""
        return self.rows.shape[0] + (self.num_columns if self.both else 0)

    @property
    def labels_of_losses(self) -> Tensor:
        """(num_losses,)."""
        return self._both_labels if self.both else self.row_labels

    @cached_property
    def _both_labels(self) -> Tensor:
        assert self.column_labels is not None
        return torch.cat([self.row_labels, self.column_labels])

    @property
    def column_losses(self) -> slice:
        """Their place among all losses."""
        return slice(self.rows.shape[0], self.num_losses)

    @property
    def filters(self) -> bool:
        """Whether tiles may be left out of the gradients."""
        # What is left out is added pair by pair to a whole gradient in the end. With variables, the
        # slope of a sum's terms has no useful bound, and tiles of a log-sum-exp without a gradient
        # of cosines would still have one of variables. With several centers, which of them a target
        # has is known in its tile alone.
        if not self.skip_tolerance > 0.0:
            return False
        streamed = any(variable.streamed for variable in self.spec.variables)
        return self.sink is None and not streamed and not self.both and self.centers == 1

    @cached_property
    def pair_counts(self) -> tuple[Tensor, Tensor]:
        """(num_losses,) int64 numbers of positives and of negatives of each row, and with ``both``
        of each column; 0 if it is ignored.

        By sorting, without the N x M comparison and without a host sync.
        """
        if self.cache is None:
            return self._counted_pairs()
        if self.cache.pair_counts is None:
            self.cache.pair_counts = self._counted_pairs()
        return self.cache.pair_counts

    def _counted_pairs(self) -> tuple[Tensor, Tensor]:
        labels, offset = self.row_labels, self.self_offset
        if self.spec.topology == "class":
            positives = (labels >= 0).to(torch.int64)
            return positives, torch.where(labels == -1, 0, self.num_columns - positives)
        others = labels if self.column_labels is None else self.column_labels
        if not self.both:
            return pair_counts(labels, others, offset)
        back = None if offset is None else -offset
        everyone = (labels, others) if self.towers is None else self.towers[2:]
        sides = (
            pair_counts(labels, everyone[1], offset),
            pair_counts(others, everyone[0], back),
        )
        positives, negatives = (torch.cat(both) for both in zip(*sides, strict=True))
        return positives, negatives

    @cached_property
    def ignored(self) -> Tensor:
        """(N,) bool."""
        return self.row_labels == -1

    @property
    def all_labeled(self) -> bool:
        """Whether no label is known to be negative."""
        return self.label_range is not None and self.label_range[0] >= 0

    @cached_property
    def may_have_ignored(self) -> bool:
        """Whether a loss is ignored; true where the answer would wait for a device."""
        if self.all_labeled:
            return False
        return self.row_labels.is_cuda or bool((self.labels_of_losses == -1).any())

    @cached_property
    def valid_rows(self) -> Tensor:
        """(num_losses,) bool: rows, and with ``both`` columns, that have one; no host sync."""
        if self.spec.valid_rows == "labeled":
            return self.labels_of_losses != -1
        positives, negatives = self.pair_counts
        if self.spec.valid_rows == "with_both":
            return (positives > 0) & (negatives > 0)
        return (positives if self.spec.valid_rows == "with_positives" else negatives) > 0

    def num_valid_rows(self) -> Tensor:
        """Number of rows, of all ranks, that have a loss, at least 1; () float32, no host sync."""
        ranks = self.ranks if self.towers is None else self.towers.rows
        if ranks is not None:
            return ranks.num_valid_rows
        if self.cache is not None and self.cache.num_valid_rows is not None:
            return self.cache.num_valid_rows
        if self.all_labeled and self.spec.valid_rows == "labeled":
            found = self.rows.new_full((), self.num_losses, dtype=torch.float32)
        else:
            found = self.valid_rows.sum().clamp(min=1).to(torch.float32)
        if self.cache is not None:
            self.cache.num_valid_rows = found
        return found


class ShardPart(NamedTuple):
    """Fields of :class:`Call` in partial FC; unlike a caller's, the index is surely in range."""

    column_index: Tensor | None = None
    mixing: Mixing | None = None
    sink: ColumnSink | None = None
    shards: Shards | None = None


_WHOLE = ShardPart()


def make_call(
    config: CallConfig,
    tensors: CallTensors,
    cache: ForwardCache | None = None,
    part: ShardPart = _WHOLE,
) -> Call:
    """Kernels read raw memory: what they rely on is made true here, for all of them."""
    rows, row_labels, columns, column_labels, column_index, threshold, variables = tensors
    static, centers = vars(config), 1
    if columns is not None:
        if config.self_offset is not None:
            # Beyond either end no pair is left out; kernels add 64-bit integers to it.
            offset = max(-rows.shape[0], min(config.self_offset, columns.shape[0]))
            static = {**static, "self_offset": offset}
        columns = dense(columns)
    if column_index is not None:
        column_index = _labels(column_index)
        if column_index.is_cuda:
            assert columns is not None
            # The error for an index out of range comes later, see ``validate.in_range``.
            column_index = column_index.clamp(0, max(columns.shape[0] - 1, 0))
    if columns is not None and columns.dim() == 3 and config.spec.topology == "class":
        centers, columns = columns.shape[1], columns.flatten(0, 1)
    call = object.__new__(Call)
    # The constructor of a frozen class sets one field at a time, which takes longer than all else.
    vars(call).update(
        static,
        rows=dense(rows),
        row_labels=_labels(row_labels),
        columns=columns,
        column_labels=None if column_labels is None else _labels(column_labels),
        column_index=column_index if part.column_index is None else part.column_index,
        threshold=None if threshold is None else _vector(threshold),
        variables=None if variables is None else _vector(variables),
        centers=centers,
        mixing=part.mixing,
        cache=cache,
        shards=part.shards,
        sink=part.sink,
    )
    return call


def _labels(tensor: Tensor) -> Tensor:
    return dense(as_dtype(tensor, torch.int64))


def _vector(tensor: Tensor) -> Tensor:
    tensor = as_dtype(tensor, torch.float32)
    return dense(tensor if tensor.dim() == 1 else tensor.reshape(-1))


def thresholds_in_use(call: Call) -> Tensor | None:
    """The call's thresholds; 0 in place of those of ignored samples, which may be NaN."""
    if call.spec.threshold != "per_column" or call.spec.topology == "class":
        return call.threshold
    assert call.threshold is not None
    labels = call.row_labels if call.column_labels is None else call.column_labels
    return torch.where(labels >= 0, call.threshold, 0.0)


def not_finite(call: Call, inverse_norms: Tensor) -> Tensor:
    """(num_losses,) float32: NaN for a row whose features or thresholds are not finite, else 0.

    Added to the rows' losses, it makes such a row NaN where no pair does: without another sample,
    without negatives, against an empty memory, or with an infinite threshold that makes a term 0.
    The caller clears the sum of an ignored row, once: its terms may be NaN as well.

    Args:
        inverse_norms: (num_losses,) of :meth:`Engine.normalize_rows` of what has them.
    """
    doubtful, thresholds = inverse_norms, thresholds_in_use(call)
    if thresholds is not None:
        # One number as it is: on a GPU launches count. The sum of many could overflow.
        one = thresholds if call.spec.threshold == "scalar" else (thresholds * 0.0).sum()
        doubtful = doubtful + one
    return doubtful * 0.0


def clear_ignored(call: Call, of_rows: Tensor) -> None:
    """Ignored rows of an (N, D) tensor, or (num_losses,) losses, become 0: their features may be
    NaN, as 0 times it is. Most calls need no pass over the tensor.
    """
    if call.may_have_ignored:
        losses = of_rows.dim() == 1
        ignored = call.labels_of_losses == -1 if losses else call.ignored[:, None]
        of_rows.masked_fill_(ignored, 0.0)


def clear_ignored_columns(call: Call, labels: Tensor | None, of_columns: Tensor) -> None:
    """Ignored columns of a block (m, D) become 0 likewise, by their labels (m,)."""
    if call.both:
        assert labels is not None
        ignored = labels < 0
        if labels.is_cuda or bool(ignored.any()):
            of_columns.masked_fill_(ignored[:, None], 0.0)


def split_weights(call: Call, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """(num_losses,) upstream gradients as factors of at most 1 and a common scale (), or unchanged.

    Gradient tiles in float16 would overflow under loss scaling; the scale is applied in float32
    when the rows' gradients are finished.
    """
    everyone = weights
    if call.ranks is not None and call.ranks.weights is not None:
        everyone = call.ranks.weights
    elif call.towers is not None:
        everyone = torch.cat(call.towers.weights())
    if call.compute_dtype != torch.float16 or everyone.numel() == 0:
        return weights, None
    scale = everyone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return weights / scale, scale


@dataclass
class Result:
    """Result of a forward pass; gradients are float32, for an upstream gradient of one.

    Attributes:
        loss: () or, with ``reduction="none"``, (num_losses,) float32.
        state: what the backward pass needs of it, (``state_rows``, num_losses) float32; None for
            sum.
        gradients: those that the pass yields.
    """

    loss: Tensor
    state: Tensor | None
    gradients: Gradients
