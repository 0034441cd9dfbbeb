"""Ranges of labels.

On a CUDA tensor reading the labels would synchronize. The range is checked on the device, the
result copied to pinned memory, and reported by the first call after its arrival.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import LossSpec


class _Check(NamedTuple):
    """A check whose numbers are on their way to pinned memory; ``is_bad`` judges them there."""

    arrival: torch.cuda.Event
    found: Tensor
    is_bad: Callable[[Tensor], bool]
    message: str


#: The smallest and the largest of some integers.
Range = tuple[int, int]

_pending: list[_Check] = []


def in_range(name: str, value: Tensor, low: int, high: int | None) -> Range | None:
    """Integers in [low, high), or [low, inf) without ``high``.

    On CUDA the error of a call is raised by a later call, or at once if the environment has
    ``UNITSFACE_CHECK=1``.

    Returns:
        The smallest and the largest; None: there are none, or they are on a device.
    """
    if value.numel() == 0:
        return None
    if high is not None and high <= low:
        raise ValueError(f"{name} must be empty, as nothing can be chosen from, got {len(value)}")
    if not value.is_cuda:
        first, last = torch.aminmax(value)
        smallest, largest = int(first), int(last)
        if smallest < low or (high is not None and largest >= high):
            raise ValueError(
                f"{_message(name, low, high)}, got {smallest if smallest < low else largest}"
            )
        return smallest, largest
    # Streams, captures and events are those of the labels' device, not of the current one.
    with torch.cuda.device(value.device):
        if torch.cuda.is_current_stream_capturing():
            return None
        report_pending()

        def outside(ends: Tensor) -> bool:
            smallest, largest = ends.tolist()
            return smallest < low or (high is not None and largest >= high)

        # One launch; compared on the host.
        ends = value.new_empty(2)
        torch.aminmax(value, out=(ends[0], ends[1]))
        _report(ends, outside, _message(name, low, high))
    return None


def _message(name: str, low: int, high: int | None) -> str:
    message = f"{name} must be in [{low}, {'inf' if high is None else high})"
    return f"{message} (-1: ignored)" if low < 0 else message


def report_pending() -> None:
    """Raise for labels of an earlier CUDA call that were found out of range."""
    # A busy device does not delay the results of another.
    arrived = [check for check in _pending if check.arrival.query()]
    if not arrived:
        return
    _pending[:] = [check for check in _pending if all(check is not one for one in arrived)]
    for check in arrived:
        if check.is_bad(check.found):
            _pending.clear()
            raise ValueError(f"{check.message}, got others in an earlier call")


def call_labels(
    spec: LossSpec,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    identities: int | None = None,
    lowest: int = -1,
) -> Range | None:
    """Ranges of every label and index of a call; ``identities``: how many have a threshold.

    Sharded class losses pass ``lowest=-2``: the target of such a row is in another shard.

    Returns:
        The smallest and the largest label of rows and columns; None: not known.
    """
    if spec.topology == "pair":
        found = in_range("labels", row_labels, -1, identities)
        if column_labels is None:
            return found
        others = in_range("memory_labels", column_labels, -1, identities)
        if found is None or others is None:
            return None
        return min(found[0], others[0]), max(found[1], others[1])
    assert columns is not None
    count = columns.shape[0]
    if column_index is not None:
        in_range("class_index", column_index, 0, count)
        count = column_index.shape[0]
    return in_range("labels", row_labels, lowest, count)


def report_later(bad: Tensor, message: str) -> None:
    """Raises in a later call if ``bad``, () bool of a CUDA device, is true; at once with
    ``UNITSFACE_CHECK=1``.
    """
    with torch.cuda.device(bad.device):
        if not torch.cuda.is_current_stream_capturing():
            _report(bad, bool, message)


def _report(found: Tensor, is_bad: Callable[[Tensor], bool], message: str) -> None:
    """``found`` is on the current device."""
    if os.environ.get("UNITSFACE_CHECK") == "1":
        if is_bad(found):
            raise ValueError(f"{message}, got others")
        return
    arrived = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    arrived.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(found.device))
    _pending.append(_Check(event, arrived, is_bad, message))
