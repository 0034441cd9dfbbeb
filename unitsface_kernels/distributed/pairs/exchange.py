"""Exchange of features between ranks: all at once, or half a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from ...backends.streaming import Blocks, CallConfig
from ..collectives import (
    Group,
    own_rank,
    start_gather_rows,
    start_pass_on,
    start_scatter_sums,
    sum_over_ranks,
)

EXCHANGES = ("auto", "gather", "ring")
#: Features of all ranks up to this size are gathered by "auto": one collective instead of
#: 2 (W - 1) messages, each of which would be short.
LARGEST_GATHER = 64 * 2**20


@dataclass(frozen=True)
class Setting:
    """Static part of a call across ranks.

    Attributes:
        config: the call; its ``self_offset`` is the place of the own rows among the columns, and
            it needs the same gradients on every rank.
        group: the ranks.
        counts: rows of every rank.
        ring: whether half batches are passed around, instead of gathering all of them.
        column_counts: columns of every rank, which has its own; None: all have the same, or none.
    """

    config: CallConfig
    group: Group
    counts: Sequence[int]
    ring: bool
    column_counts: Sequence[int] | None = None

    def of_columns(self) -> Setting:
        """The exchange of the columns that every rank has."""
        assert self.column_counts is not None
        return replace(self, counts=self.column_counts)


def takes_ring(exchange: str, counts: Sequence[int], feats: Tensor) -> bool:
    """Whether features are passed around, the same on every rank."""
    if exchange != "auto":
        return exchange == "ring"
    return sum(counts) * feats.shape[1] * feats.element_size() > LARGEST_GATHER


def slot(rows: Tensor, count: int) -> Tensor:
    """Memory for ``count`` remote rows."""
    return rows.new_empty((count, rows.shape[1]))


class Exchange:
    """The other ranks of a call; see ``backends.streaming.call.Ranks``.

    Args:
        rows: (n, D) features of this rank, contiguous.
        setting: of the call.
        gathered: (T, D) features of all ranks, if an earlier pass has gathered them.
    """

    num_valid_rows: Tensor
    weights: Tensor | None = None

    def __init__(self, rows: Tensor, setting: Setting, gathered: Tensor | None = None) -> None:
        self._rows = rows
        self._counts = setting.counts
        self._group = setting.group
        self._ring = setting.ring
        self._rank = own_rank(setting.group)
        self._starts = [0, *accumulate(setting.counts)]
        #: Set by the first pass that gathers.
        self.gathered = gathered

    @property
    def start(self) -> int:
        """Place of the own rows among those of all ranks."""
        return self._starts[self._rank]

    @property
    def size(self) -> int:
        """Rows of all ranks."""
        return self._starts[-1]

    def gather(self, own: Tensor) -> Tensor:
        return start_gather_rows(own, self._counts, self._group)()

    def own_sums(self, everyone: Tensor) -> Tensor:
        return start_scatter_sums(everyone.clone(), self._counts, self._group)()

    def total(self, own: Tensor) -> Tensor:
        return sum_over_ranks(own, self._group)

    def blocks(self) -> Blocks:
        if self._ring:
            return passed_on(self._rows, self._counts, self._group)
        if self.gathered is not None:
            return self._of_gathered(None)
        return self._of_gathered(start_gather_rows(self._rows, self._counts, self._group))

    def _of_gathered(self, finish: Callable[[], Tensor] | None) -> Blocks:
        """Rows before and after the own ones: at most two blocks for any number of ranks."""
        if finish is not None:
            self.gathered = finish()
        assert self.gathered is not None
        total, end = self._starts[-1], self._starts[self._rank + 1]
        for place in (slice(0, self.start), slice(end, total)):
            if place.start < place.stop:
                yield place, self.gathered[place]


def passed_on(rows: Tensor, counts: Sequence[int], group: Group) -> Blocks:
    """Batches from one rank to the next, all their first halves before their second halves.

    Two slots of half a batch: while one is computed with, and sent on, the other receives. So what
    a rank holds of others is never more than the largest batch. The first half begins to travel
    with the call.

    Args:
        rows: (n, D) of this rank, contiguous.
        counts: rows of every rank.
    """
    rank, size = own_rank(group), len(counts)
    starts = [0, *accumulate(counts)]
    steps = [(half, distance) for half in (0, 1) for distance in range(1, size)]
    places = [_half(starts, (rank - distance) % size, half) for half, distance in steps]
    largest = (max(counts) + 1) // 2
    slots = [slot(rows, largest) for _ in steps[:2]]
    received = [slots[k % 2][: place.stop - place.start] for k, place in enumerate(places)]

    def start(step: int) -> Callable[[], None]:
        half, distance = steps[step]
        sent = received[step - 1]
        if distance == 1:
            place = _half(starts, rank, half)
            sent = rows[place.start - starts[rank] : place.stop - starts[rank]]
        return start_pass_on(sent, received[step], group)

    def blocks(pending: Callable[[], None]) -> Blocks:
        for step, place in enumerate(places):
            pending()
            if step + 1 < len(steps):
                pending = start(step + 1)
            if place.start < place.stop:
                yield place, received[step]

    return blocks(start(0))


def _half(starts: Sequence[int], rank: int, half: int) -> slice:
    """Place of half of a rank's rows among those of all."""
    start, end = starts[rank], starts[rank + 1]
    middle = start + (end - start + 1) // 2
    return slice(middle, end) if half else slice(start, middle)
