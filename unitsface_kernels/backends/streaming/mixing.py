"""Rows mixed into the columns of a call: they are compared with, but have no gradient.

A column of raw row w and share s > 0 is compared as the direction of (1 - s) u + s m, where u is w
at unit length and m its mixed row; with share 0 it is compared as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Changes:
    """What happened to rows after some moment: a list that ends at the present.

    Who may look back to a moment keeps its element, and with it all later ones.

    Attributes:
        slots: (n,) rows that were replaced next, some of them several times.
        before: (n, D) what they were before.
        later: the element of the moment after that; None: nothing has happened yet.
    """

    slots: Tensor | None = None
    before: Tensor | None = None
    later: Changes | None = None
    _places: Tensor | None = field(default=None, repr=False)

    def then(self, slots: Tensor, before: Tensor) -> Changes:
        """Notes a change; returns the moment after it."""
        self.slots, self.before, self.later = slots, before, Changes()
        return self.later

    def places(self, count: int) -> Tensor:
        """(count,) places in ``before`` of all rows, -1 of those that were not replaced."""
        assert self.slots is not None
        if self._places is None:
            numbers = torch.arange(len(self.slots), device=self.slots.device)
            places = torch.full((count,), -1, dtype=torch.int64, device=self.slots.device)
            # For a row that was replaced twice at once either one will do.
            self._places = places.scatter_reduce(0, self.slots, numbers, "amax")
        return self._places


@dataclass(frozen=True)
class Mixing:
    """The rows that are mixed into columns, as they were when this was made.

    A backward pass comes after the rows have moved, and neither pass copies all of them.

    Attributes:
        rows: (M, D) unit rows.
        share: (M,) in [0, 1] of each in its column.
        moment: after which the rows may have changed.
    """

    rows: Tensor
    share: Tensor
    moment: Changes

    def part(self, start: int, stop: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """(m, D) rows and (m,) shares of columns ``start:stop``, or of these of ``index``.

        Rows without a share are any finite ones.
        """
        if index is None:
            place: slice | Tensor = slice(start, stop)
        else:
            place = index[start:stop]
        rows = self.rows[place]
        for change in self._since:
            assert change.before is not None
            which = change.places(len(self.rows))[place]
            old = change.before[which.clamp(min=0)]
            rows = torch.where((which >= 0)[:, None], old, rows)
        return rows, self.share[place]

    @property
    def _since(self) -> list[Changes]:
        """All changes since then, the latest first."""
        found, moment = [], self.moment
        while moment.later is not None:
            found.append(moment)
            moment = moment.later
        return found[::-1]
