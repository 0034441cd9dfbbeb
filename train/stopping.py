"""Signals that ask a run to stop, as schedulers send them to a job they preempt."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# torchrun passes on to its processes what they may have got themselves.
SAME_SIGNAL_S = 5.0


@contextmanager
def stop_on_signal(patience_s: float = 0.0) -> Iterator[list[int]]:
    """Collects a first SIGINT or SIGTERM instead of dying of it; a second one is not caught.

    What comes within ``patience_s`` seconds of the first one counts as the same.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}
    first = 0.0

    def receive(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
            received.append(number)
            if not patience_s:
                restore()
        elif time.monotonic() - first > patience_s:
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        for n, handler in previous.items():
            signal.signal(n, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[int(number)] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def leave_signals(worker: int) -> None:
    """For processes that decode images: a scheduler may signal every process of a job, and a run
    needs them until it has stopped. They end when it does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
