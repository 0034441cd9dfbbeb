"""Time of the parts of a step, measured by the clock of the device that runs them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Parts in their order; the first is the time that the process spends waiting for a batch.
PARTS = ("data", "augment", "forward", "backward", "optimizer")


class StepClock:
    """Marks the ends of the parts of steps, on CUDA by events: nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []  # what has ended, and when
        self._waited = 0.0
        self._steps = 0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for them is added up."""
        source, end = iter(batches), object()
        while True:
            start = time.perf_counter()
            batch: Any = next(source, end)
            self._waited += time.perf_counter() - start
            if batch is end:
                return
            self._steps += 1
            yield batch

    def mark(self, part: str = "") -> None:
        """The end of ``part``; without a name, the beginning of a step."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((part, now))

    def take(self) -> dict[str, float]:
        """Milliseconds of a step for each part, on average since the last call.

        On CUDA, call it when the device is known to have finished these steps; else it waits.
        """
        sums: dict[str, float] = defaultdict(float, data=self._waited * 1e3)
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                cuda = self._device.type == "cuda"
                sums[part] += start.elapsed_time(end) if cuda else (end - start) * 1e3
        steps = max(1, self._steps)
        self._marks, self._waited, self._steps = [], 0.0, 0
        return {f"{part}_ms": round(sums[part] / steps, 3) for part in PARTS}
