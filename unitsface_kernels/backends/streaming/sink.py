"""Where the gradient of a call's columns goes in place of one tensor of it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

#: Takes the (m, D) float32 gradient of the columns in a slice, which it may overwrite. If it makes
#: a step of an optimizer with it, an attribute ``step`` may be the :class:`RowStep`.
ColumnSink = Callable[[slice, Tensor], None]


@dataclass(frozen=True)
class RowStep:
    """A step on rows of the columns, all tensors dense and float32; see ``row_update.h``.

    Attributes:
        weight: the columns, (m, ...).
        states: of the optimizer, of the shape of ``weight``.
        rule: RowRule.
        numbers: hyper-parameters by name.
        scale: () factor of the gradient, or None.
    """

    weight: Tensor
    states: tuple[Tensor, ...]
    rule: int
    numbers: Mapping[str, float]
    scale: Tensor | None
