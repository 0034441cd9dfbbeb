"""Times on a device: events, after a warm-up, as medians; with cold caches where that matters."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP = 3
LEAST, MOST = 5, 200


class CacheFlush:
    """Overwrites more than the second-level cache holds.

    The host gets ahead of the device meanwhile, so that what follows is not waited for.
    """

    def __init__(self) -> None:
        size = 3 * torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(size, 1 << 26), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self._buffer.zero_()


def seconds(
    run: Callable[[], object],
    at_least: float = 0.2,
    repeats: int = 1,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """Event times of ``run``, after a warm-up.

    Args:
        run: launches work on the current stream.
        at_least: seconds of work together, in ``LEAST`` to ``MOST`` samples.
        repeats: calls per sample, for work that is short against the resolution of events.
        before: called outside the timed part of every sample, such as a :class:`CacheFlush`.
    """
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    while len(times) < LEAST or (sum(times) * repeats < at_least and len(times) < MOST):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return times


def median(run: Callable[[], object], **options: object) -> float:
    """The median of :func:`seconds`."""
    return statistics.median(seconds(run, **options))  # type: ignore[arg-type]
