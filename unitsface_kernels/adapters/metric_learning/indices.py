"""Pairs and triplets that a miner found, as lists of indices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import validate
from ...validate.arguments import INTEGER_DTYPES


class Pairs(NamedTuple):
    """Positive pairs (anchors, positives) and negative pairs (others, negatives), int64: rows, and
    columns.
    """

    anchors: Tensor
    positives: Tensor
    others: Tensor
    negatives: Tensor

    @property
    def few(self) -> bool:
        """Whether there is at most one of either kind: the original then has no loss."""
        return len(self.anchors) <= 1 and len(self.others) <= 1


def checked(given: object, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
    """Three or four lists as int64 on the device; they may come from another one."""
    if not isinstance(given, (tuple, list)) or len(given) not in (3, 4):
        got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
        raise ValueError(
            "indices_tuple must be (anchors, positives, negatives) or (anchors, positives, "
            f"anchors, negatives), got {got}"
        )
    triplets = len(given) == 3
    bounds = (rows, columns, columns) if triplets else (rows, columns, rows, columns)
    found: list[Tensor] = []
    for place, (each, bound) in enumerate(zip(given, bounds, strict=True)):
        name = f"indices_tuple[{place}]"
        each = validate.is_tensor(name, each)
        # An empty list is made without a dtype.
        if each.numel() and each.dtype not in INTEGER_DTYPES:
            raise TypeError(f"{name} must have an integer dtype, got {each.dtype}")
        # Lists of one kind of pair have one length.
        first = 0 if triplets or place < 2 else 2
        length = len(found[first]) if first < place else each.numel()
        if tuple(each.shape) != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(each.shape)}")
        found.append(each.to(device=device, dtype=torch.int64))
        _in_range(name, found[-1], bound)
    return tuple(found)


def _in_range(name: str, value: Tensor, bound: int) -> None:
    """Read at once: a wrong index would be read beyond a tensor's end."""
    if value.numel():
        low, high = torch.stack(torch.aminmax(value)).tolist()
        if low < 0 or high >= bound:
            raise ValueError(f"{name} must be in [0, {bound}), got {int(low if low < 0 else high)}")


def as_pairs(found: tuple[Tensor, ...]) -> Pairs:
    """A triplet is a positive and a negative pair."""
    if len(found) == 3:
        anchors, positives, negatives = found
        return Pairs(anchors, positives, anchors, negatives)
    return Pairs(*found)


def as_triplets(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every positive pair with every negative one of its anchor."""
    if len(found) == 3:
        return found
    anchors, positives, others, negatives = found
    first, second = torch.where(anchors[:, None] == others)
    return anchors[first], positives[first], negatives[second]


def all_pairs(labels: Tensor, column_labels: Tensor | None = None) -> tuple[Tensor, ...]:
    """Pairs of equal and of different labels; without columns within a batch, without (i, i)."""
    same = labels[:, None] == (labels if column_labels is None else column_labels)
    different = ~same
    if column_labels is None:
        same.fill_diagonal_(False)
    return (*torch.where(same), *torch.where(different))


def without_copies(found: tuple[Tensor, ...], places: Tensor) -> tuple[Tensor, ...]:
    """Without positives that are the anchor's own copy, the column ``places[anchor]``."""
    kept = found[1] != places[found[0]]
    parts = 3 if len(found) == 3 else 2
    return (*(each[kept] for each in found[:parts]), *found[parts:])


def joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Both lists, the second in the form of the first."""
    if len(first) != len(second):
        second = as_triplets(second) if len(first) == 3 else as_pairs(second)
    return tuple(torch.cat([a, b.to(a.device)]) for a, b in zip(first, second, strict=True))


def row_weights(found: tuple[Tensor, ...], rows: int, anchors_only: bool) -> Tensor:
    """(rows,) how often each is listed, over that of the most frequent; 1 if none is."""
    listed = found if not anchors_only else (found[0], *found[2:-1])
    places = torch.cat(listed)
    weights = torch.zeros(rows, device=places.device)
    if not places.numel():
        return weights + 1
    counts = torch.bincount(places, minlength=rows).to(weights.dtype)
    return counts / counts.max()
