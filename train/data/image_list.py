"""A set of labeled images, independent of their storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from train.data.records import Records
from train.errors import UserError


@dataclass(frozen=True)
class ImageList:
    """Images ``rows`` of ``records``; ``labels[i]`` indexes ``identities``.

    Arrays, not lists: 42 million images take 16 bytes each here, and worker processes share them.
    """

    records: Records
    rows: NDArray[np.int64]  # (N,)
    labels: NDArray[np.int64]  # (N,)
    identities: Sequence[str]
    # Reasons, by name, of what a scan that may skip has left out.
    left_out: Mapping[str, str] = field(default_factory=dict)
    # False if identities are numbers that mean nothing outside of these records.
    named: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        return self.records.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.records.name(int(self.rows[index]))

    def keep(self, chosen: NDArray[np.integer] | Sequence[int]) -> ImageList:
        """The list of these images, with labels counted from 0 over the identities that remain."""
        chosen = np.asarray(chosen, dtype=np.int64)
        labels = self.labels[chosen]
        # Counted, not sorted: a sort of 42 million labels takes longer than reading the index.
        found = np.bincount(labels, minlength=len(self.identities)) > 0
        numbers = np.cumsum(found) - 1
        kept = [self.identities[label] for label in np.flatnonzero(found)]
        rows, labels = self.rows[chosen], numbers[labels]
        return replace(self, rows=rows, labels=labels, identities=kept, left_out={})


def whole(
    records: Records,
    labels: Sequence[int] | NDArray[np.integer],
    identities: Sequence[str],
    *,
    named: bool = True,
    left_out: Mapping[str, str] | None = None,
) -> ImageList:
    """All images of ``records``."""
    rows = np.arange(len(records), dtype=np.int64)
    labels = np.asarray(labels, dtype=np.int64)
    return ImageList(records, rows, labels, identities, left_out or {}, named)


def split_identities(images: ImageList, holdout: int) -> tuple[ImageList, ImageList]:
    """Training and test images: the last ``holdout`` identities are the test."""
    count = len(images.identities)
    if count - holdout < 2:
        held = f" besides the {holdout} held out" if holdout else ""
        raise UserError(f"data.path: need at least 2 identities to train on{held}, found {count}")
    train = images.labels < count - holdout
    return images.keep(np.flatnonzero(train)), images.keep(np.flatnonzero(~train))


class Problems:
    """Mistakes in the data: the first stops the scan, or all are collected where it may skip."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.messages: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        message = f"{name}: {reason}"
        if not self.skip:
            raise UserError(f"{message} (data.on_error=skip leaves such images out)")
        self.messages.setdefault(name, message)


def numbered(records: Records, numbers: NDArray[np.int64], problems: Problems) -> ImageList:
    """All images of ``records``, whose identities are numbers, possibly with gaps."""
    found, labels = np.unique(numbers, return_inverse=True)
    names = [str(number) for number in found.tolist()]
    return whole(records, labels, names, named=False, left_out=problems.messages)
