"""Programs in process groups of their own, which end with the process that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1
#: Seconds between two looks at a running program.
POLL_S = 0.25
#: Fraction of a limit left to a program after an interrupt: pytest prints its summary.
GRACE = 0.1
MOST_GRACE_S = 5.0
#: Status of a program that was ended at its limit, as of timeout(1).
TIMED_OUT = 124
NOT_FOUND = 127


def _own_group() -> None:
    os.setpgid(0, 0)
    # Ignored in what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Also if this process is killed, whose own cleanup then does not run.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    argv: Sequence[str],
    limit: float,
    log: IO[str],
    *,
    environment: dict[str, str] | None = None,
    watch: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs a program until it ends or has taken ``limit`` seconds, and all that it has started.

    Args:
        argv: program and arguments.
        limit: seconds, the time to end after an interrupt included.
        log: its output and errors are appended.
        environment: variables besides those of this process.
        watch: called while it runs.
        clock: in seconds.

    Returns:
        Its exit status; ``TIMED_OUT``, ``NOT_FOUND``, or 128 and the number of a signal.
    """
    log.write(f"$ {' '.join(argv)}\n")
    log.flush()
    start = clock()
    try:
        process = subprocess.Popen(
            list(argv),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            preexec_fn=_own_group,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return NOT_FOUND
    interrupt = limit - min(GRACE * limit, MOST_GRACE_S)
    interrupted = False
    try:
        while process.poll() is None:
            spent = clock() - start
            if spent >= interrupt and not interrupted:
                interrupted = True
                _signal(process.pid, signal.SIGINT)
            if spent >= limit:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(POLL_S, max(limit - spent, 0.0)))
            watch()
    finally:
        # Whatever it left running, too.
        _signal(process.pid, signal.SIGKILL)
        process.wait()
    if interrupted:
        log.write(f"ended at its limit of {limit:.0f} s\n")
        return TIMED_OUT
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
