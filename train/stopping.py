"""Signals that stop a run, as schedulers send them to a job they preempt.

The first one is noted, and the run stops where its state is whole. A thread ends
the process even where it waits for something that does not come: a batch, another process, a disk.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any

# torchrun passes on to its processes what they may have got themselves.
SAME_SIGNAL_S = 5.0
# From the signal to the end of the process, beside twice what a step or a checkpoint takes.
PATIENCE_S = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_longest_s = 0.0


class StoppedError(Exception):
    """Work was left unfinished because of a signal; the next run begins it again."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def requested() -> int:
    """The signal that stops the run; 0 without any."""
    return _received[0] if _received and _in_main_thread() else 0


def took(seconds: float) -> None:
    """A step or a checkpoint took so long; the next one may, after a signal."""
    global _longest_s
    _longest_s = max(_longest_s, seconds)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def end_on_signal() -> Iterator[None]:
    """A signal that has a handler ends the process within ``PATIENCE_S`` seconds and twice the time
    of a step, if nothing else has ended it; a second one at once.

    Handlers of Python wait until the main thread is back from what it calls. So a thread reads the
    numbers of signals, which the interpreter writes to a pipe as they arrive. Outside the main
    thread, where nothing can be known of signals, they stay the caller's.
    """
    global _longest_s
    if not _in_main_thread():
        yield
        return
    _longest_s = 0.0
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(read,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def _watch(pipe: int) -> None:
    first = number = 0
    while True:
        left = None
        if number:
            left = max(0.0, first + PATIENCE_S + 2 * _longest_s - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            _end(number)
        for byte in os.read(pipe, 512):
            if byte == 0:
                return
            if byte not in SIGNALS:
                continue
            if number and time.monotonic() - first > SAME_SIGNAL_S:
                _end(byte)
            if not number:
                first, number = time.monotonic(), byte


def _end(number: int) -> None:
    said = f"\nended by {signal.Signals(number).name} in the middle of what was under way\n"
    for process in active_children():
        process.kill()
    os.write(2, said.encode())
    os._exit(128 + number)


@contextmanager
def stop_on_signal(patience_s: float = 0.0) -> Iterator[list[int]]:
    """Collects a first SIGINT or SIGTERM instead of ending; a second one is not caught.

    What comes within ``patience_s`` seconds of the first one counts as the same. Outside the main
    thread nothing is collected.
    """
    if not _in_main_thread():
        yield []
        return
    _received.clear()
    previous: dict[int, Any] = {}
    first = 0.0

    def receive(number: int, frame: Any) -> None:
        nonlocal first
        if not _received:
            first = time.monotonic()
            _received.append(number)
            if not patience_s:
                restore()
        elif time.monotonic() - first > patience_s:
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        for n, handler in previous.items():
            signal.signal(n, handler)

    for number in SIGNALS:
        previous[int(number)] = signal.signal(number, receive)
    try:
        yield _received
    finally:
        restore()
        _received.clear()


def leave_signals(worker: int) -> None:
    """For processes that decode images: a scheduler may signal every process of a job, and a run
    needs them until it has stopped. They end when it does.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
