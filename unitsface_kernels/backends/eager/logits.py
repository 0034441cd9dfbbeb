"""Logits of pairs of samples, in the two directions of a pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..streaming import NegativeSums, PairTile, TileVariables
from .terms import Logits


def logits_of(
    term: Callable[..., Logits], cosine: Tensor, tile: PairTile, both: bool
) -> list[Logits]:
    """Logits of the rows' direction and, with ``both``, of the other one: the same object if they
    do not differ.
    """
    given = tile.variables
    found = [term(cosine, values_of(given))]
    directed = given is not None and len(given.a_rows) + len(given.b_columns) > 0
    if both:
        found.append(term(cosine, values_of(given, back=True)) if directed else found[0])
    return found


def values_of(variables: TileVariables | None, back: bool = False) -> list[Tensor]:
    """Values of a tile's variables, to be broadcast over its pairs; ``back``: as the other
    direction reads them.
    """
    if variables is None:
        return []
    rows, columns, first, second = variables.a_rows, variables.b_columns, -1, -2
    if back:
        assert variables.b_rows is not None
        assert variables.a_columns is not None
        rows, columns, first, second = variables.b_rows, variables.a_columns, -2, -1
    scalars = variables.scalars[:, None, None]
    return [*scalars, *rows.unsqueeze(first), *columns.unsqueeze(second)]


def chosen(mask: Tensor, yes: list[Logits], no: list[Logits]) -> list[Logits]:
    """Logits of both directions, which are one object where they do not differ."""
    found = [
        Logits(
            torch.where(mask, a.value, b.value),
            torch.where(mask, a.slope, b.slope),
            [torch.where(mask, *by) for by in zip(a.by_variables, b.by_variables, strict=True)],
        )
        for a, b in zip(dict.fromkeys(yes), dict.fromkeys(no), strict=True)
    ]
    return [found[0], found[-1]][: len(yes)]


def fold_both(
    rows: NegativeSums, columns: NegativeSums | None, logits: list[Logits], taken: Tensor
) -> None:
    """Adds the ``taken`` pairs' logits of both directions."""
    values = [torch.where(taken, z.value, -torch.inf) for z in dict.fromkeys(logits)]
    fold(rows, values[0], 1)
    if columns is not None:
        fold(columns, values[-1], 0)


def fold(sums: NegativeSums, logit: Tensor, dim: int) -> None:
    """Adds exp(logit) along ``dim`` to running sums."""
    maximum = torch.maximum(sums.maximum, logit.amax(dim=dim))
    # Without negatives the maximum is -inf, and -inf - -inf would be NaN.
    shift = torch.where(maximum == -torch.inf, 0.0, maximum)
    total = torch.exp(logit - shift.unsqueeze(dim)).sum(dim=dim)
    sums.total.mul_(torch.exp(sums.maximum - shift)).add_(total)
    sums.maximum.copy_(maximum)
