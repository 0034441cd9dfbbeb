"""InfoNCE of queries against keys, of which any number have the query's label."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..backends.reference import normalize_rows
from ..distributed import pairs
from ..losses import TOWERS
from .call import Options, Samples
from .matching import Matching, match, sums_of_matching
from .tower_ranks import Places, tower_loss


class Queries(NamedTuple):
    """Arguments of :func:`fused_info_nce_loss`."""

    queries: Tensor
    labels: Tensor | None
    keys: Tensor
    key_labels: Tensor | None
    batch_offset: int | None
    both: bool


def several_positives(
    batch: Queries, scale: float | Tensor, backend: str, where: Places, exchange: str
) -> tuple[Tensor, Tensor]:
    """Losses of the queries, then with ``both`` of the keys; which of them have a positive.

    The log-sum-exp over all keys less the mean of the positives' logits, which is that of the sum
    of these keys. Of two positives or more the loss is at least the logarithm of their number, and
    the difference exact enough. A lone positive p may leave next to nothing: with the log-sum-exp N
    of the others the loss is softplus(N - p).
    """
    queries, labels, keys, key_labels, offset, both = batch
    assert labels is not None
    assert key_labels is not None
    labels, key_labels = labels.to(torch.int64), key_labels.to(torch.int64)
    counts = where.rows, where.columns
    everyone = [where.gathered(x, n) for x, n in zip((labels, key_labels), counts, strict=True)]
    sides = [_side(labels, everyone[1], offset)]
    lone = [sides[0].positives == 1]
    # Across ranks a tile has both directions, wanted or not.
    directions = both or where.group is not None
    if directions:
        sides.append(_side(key_labels, everyone[0], None))
        # A tile leaves a pair out of the sums of its query and of its key, or out of neither.
        lone.append(sides[1].positives == 1)
        for own, given, all_given in zip(lone, (labels, key_labels), everyone, strict=True):
            own &= _side(given, all_given, None).positives == 1
    row_places = torch.where(lone[0], sides[0].matching.rows, sum(where.columns))
    given_keys = keys
    if not directions:
        # Columns of a memory have to be finite, whether they take part or not.
        given_keys = torch.where((key_labels == -1)[:, None], 0.0, keys).to(keys.dtype)
    start = where.starts[1]
    column_places = sides[0].matching.columns[start : start + len(keys)]
    log_sums = tower_loss(
        TOWERS["info_nce"],
        Samples(
            queries,
            row_places.masked_fill(labels == -1, -1),
            None,
            given_keys,
            column_places.masked_fill(key_labels == -1, -1),
            offset,
            directions,
        ),
        Options("none", backend, variables={"scale": scale}),
        where,
        exchange,
    )
    if not both:
        sides, lone, log_sums = sides[:1], lone[:1], log_sums[: len(queries)]
    unit, unit_keys = (
        normalize_rows(torch.where((x_labels == -1)[:, None], 0.0, x.to(log_sums.dtype)))
        for x, x_labels in ((queries, labels), (keys, key_labels))
    )
    plain = dispatch.resolve(backend, queries.device, queries.dtype) == "reference"
    passed = _passed_on(batch, everyone, counts) if where.takes_ring(exchange, queries) else None
    parts = []
    compared = (unit, unit_keys, where.columns), (unit_keys, unit, where.rows)
    for place, (side, (rows, columns, number)) in enumerate(zip(sides, compared, strict=False)):
        if passed is not None:
            sides_of = passed[1 - place], passed[place]
            sums = pairs.matching_sums(columns, *sides_of, where.group, _sums_by_label)
        else:
            columns = where.gathered(columns, number)
            sums = sums_of_matching(columns, side.matching, plain)
        if offset is not None:
            itself = columns[offset : offset + len(rows)]
            sums = sums - torch.where(side.holds_itself[:, None], itself, 0.0)
        parts.append((rows * sums).sum(dim=1) / side.positives.clamp(min=1))
    if isinstance(scale, Tensor):
        # A scale of any rank and dtype must not change those of the losses.
        scale = scale.reshape(())
        if where.group is not None:
            scale = pairs.replicated(scale, where.group)
    gap = log_sums - scale * torch.cat(parts)
    per_row = torch.where(torch.cat(lone), F.softplus(gap), gap)
    valid = torch.cat([side.positives for side in sides]) > 0
    # A lone positive without another column is certain.
    others = torch.cat([side.others for side in sides]) > 1
    return torch.where(valid & others, per_row, 0.0), valid


def _passed_on(
    batch: Queries, everyone: list[Tensor], counts: tuple[list[int], list[int]]
) -> list[pairs.Side]:
    """Labels of queries and of keys; those of ignored ones the other tower does not have."""
    found = []
    for place, given in enumerate((batch.labels, batch.key_labels)):
        assert given is not None
        own, all_of_them = (
            x.where(x != -1, -1 - place) for x in (given.to(torch.int64), everyone[place])
        )
        found.append(pairs.Side(own, all_of_them, counts[place]))
    return found


def _sums_by_label(values: Tensor, labels: Tensor, row_labels: Tensor) -> Tensor:
    """(m, D) values of labels (m,) -> (n, D): of each row the sum over those of its label."""
    return sums_of_matching(values, match(row_labels, labels, holds_itself=False))


class _Side(NamedTuple):
    """Rows against columns by their labels.

    Attributes:
        matching: ignored rows match none.
        positives: (N,) of each row.
        others: (N,) columns of each row.
        holds_itself: (N,) whether the column that is left out has the row's label.
    """

    matching: Matching
    positives: Tensor
    others: Tensor
    holds_itself: Tensor


def _side(labels: Tensor, column_labels: Tensor, offset: int | None) -> _Side:
    ignored = labels == -1
    found = match(labels, column_labels, holds_itself=False)
    count = found.positives.masked_fill(ignored, 0)
    found = replace(found, rows=found.rows.masked_fill(ignored, len(column_labels)))
    others = (column_labels >= 0).sum().expand_as(count)
    itself = torch.zeros_like(ignored)
    if offset is not None:
        left_out = column_labels[offset : offset + len(labels)]
        itself = (left_out == labels) & ~ignored
        count, others = count - itself.to(count), others - (left_out >= 0).to(count)
    return _Side(found, count, others, itself)
