"""Damage of files, and what a reader may do with a damaged one.

A target mutates small valid files by :func:`mutate` and calls its reader through :func:`outcome`:
a result or the reader's own error within limits of time and memory is right, anything else a
failure. Everything follows from a seed.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

CPU_SECONDS = 5.0  # of this process: other processes on the machine do not count
WALL_SECONDS = 60.0  # for what waits instead of computing
MEMORY = 512 << 20  # bytes of resident memory that one call may add
LARGEST = 1 << 18  # bytes of a mutated file

_FORMATS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q", "<f", "<d", ">d")
_NUMBERS = (
    *(b"0", b"-1", b"1", b"7", b"255", b"65536", b"2147483647", b"2147483648", b"4294967295"),
    *(b"9223372036854775807", b"18446744073709551616", b"9" * 30, b"9" * 5000, b"0" * 5000),
    *(b"nan", b"inf", b"-inf", b"1e999", b"0.5", b"0x10", b"1_0", "١٢".encode(), b""),
)
_EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 1 << 20, 1 << 29)
_EXTREMES += tuple((1 << bits) + offset for bits in (31, 32, 63, 64) for offset in (-1, 0))
_REPEATED = (b"9", b"0", b" ", b"\n", b"\0", b"\xff", b"(", b"[", b"{", b"[" * 8, b"${", b'"', b"-")


def mutate(
    data: bytes,
    rng: random.Random,
    *,
    others: Sequence[bytes] = (),
    tokens: Sequence[bytes] = (),
    largest: int = LARGEST,
) -> bytes:
    """``data`` with one to six changes, at most ``largest`` bytes (or as many as it had).

    ``others`` are files to splice with, ``tokens`` byte strings that mean something in the format.
    """
    limit = max(largest, len(data))
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_CHANGES)(damaged, rng, others or (data,), tokens)
        del damaged[limit:]
    return bytes(damaged)


def _place(data: bytearray, rng: random.Random) -> int:
    """Any byte, half of the time among the first 128, where headers are."""
    return rng.randrange(min(len(data), 128) if rng.random() < 0.5 else len(data)) if data else 0


def _block(data: bytearray, rng: random.Random) -> slice:
    """Short ones and long ones are equally likely, often at multiples of 4 or 512."""
    step = rng.choice((1, 1, 4, 512))
    start = _place(data, rng) // step * step
    return slice(start, start + step * int(2 ** rng.uniform(0, 10)))


Change = Callable[[bytearray, random.Random, Sequence[bytes], Sequence[bytes]], None]


def _flip(data: bytearray, rng: random.Random, *_: Any) -> None:
    for _ in range(rng.choice((1, 1, 4, 32)) if data else 0):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random, *_: Any) -> None:
    if data:
        data[_place(data, rng)] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(data: bytearray, rng: random.Random, *_: Any) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _field(data: bytearray, rng: random.Random, *_: Any) -> None:
    """An extreme number over the bytes of a length, an offset or a label."""
    fmt = rng.choice(_FORMATS)
    size = struct.calcsize(fmt)
    at = _place(data, rng)
    if rng.random() < 0.5:
        at = at // size * size
    if fmt[1] in "fd":
        floats = (float("nan"), float("inf"), -1.0, 0.0, 1e30, 0.5, 16777216.0)
        data[at : at + size] = struct.pack(fmt, rng.choice(floats))
        return
    value = rng.choice((*_EXTREMES, len(data), len(data) - at, len(data) + 1))
    data[at : at + size] = struct.pack(fmt, value % (1 << 8 * size))


def _number(data: bytearray, rng: random.Random, *_: Any) -> None:
    """Another number in the place of one that is written as text."""
    found = [m.span() for m in re.finditer(rb"-?[0-9][0-9.]*", bytes(data[: 1 << 16]))]
    if found:
        start, end = rng.choice(found)
        data[start:end] = rng.choice(_NUMBERS)


def _remove(data: bytearray, rng: random.Random, *_: Any) -> None:
    del data[_block(data, rng)]


def _duplicate(data: bytearray, rng: random.Random, *_: Any) -> None:
    block = _block(data, rng)
    at = rng.choice((block.start, _place(data, rng)))
    copied = bytes(data[block])
    times = int(2 ** rng.choice((0, 0, 1, rng.uniform(0, 14))))
    data[at:at] = copied * min(times, 1 + LARGEST // (len(copied) or 1))


def _swap(data: bytearray, rng: random.Random, *_: Any) -> None:
    block, at = _block(data, rng), _place(data, rng)
    moved = bytes(data[block])
    del data[block]
    data[at:at] = moved


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes], _: Any) -> None:
    other = bytearray(rng.choice(others))
    if rng.random() < 0.5:
        data[_block(data, rng)] = other[_block(other, rng)]
    else:
        data[_place(data, rng) :] = other[_place(other, rng) :]


def _token(data: bytearray, rng: random.Random, _: Any, tokens: Sequence[bytes]) -> None:
    at = _place(data, rng)
    token = rng.choice((*tokens, *_NUMBERS))
    data[at : at + rng.choice((0, 0, len(token), 1))] = token


def _repeat(data: bytearray, rng: random.Random, _: Any, tokens: Sequence[bytes]) -> None:
    """One byte or token very often: deep nesting, long numbers, long lines."""
    at = _place(data, rng)
    data[at:at] = rng.choice((*_REPEATED, *tokens)) * int(2 ** rng.uniform(4, 17))


_CHANGES: tuple[Change, ...] = (
    *(_flip, _flip, _byte, _cut, _field, _field, _number, _number),
    *(_remove, _duplicate, _swap, _splice, _token, _repeat),
)


class _TooLongError(BaseException):
    """Not an Exception: a reader that turns those into its own error must not hide this one."""


def outcome(
    call: Callable[[], Any],
    own: tuple[type[BaseException], ...],
    *,
    memory: int = MEMORY,
) -> str | None:
    """The fault of a call, in one line; None if it returns or raises an error of ``own``.

    Wrong are other errors, errors of several lines or without a text, more than ``CPU_SECONDS``,
    and more than ``memory`` bytes. Limits of time hold in the main thread, of memory on Linux.
    """
    before = _memory(peak=False)
    try:
        with _deadline():
            call()
    except own as error:
        if not str(error).strip() or "\n" in str(error) or len(str(error)) > 2000:
            return f"{type(error).__name__} without a text of one line: {str(error)[:80]!r}"
    except _TooLongError as error:
        return str(error)
    except Exception as error:  # the failure that is looked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    taken = _memory(peak=True) - before
    return f"takes {taken >> 20} MiB" if taken > memory else None


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        what = "of the processor" if number == signal.SIGPROF else "by the clock"
        at = "" if frame is None else f" in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        limit = CPU_SECONDS if number == signal.SIGPROF else WALL_SECONDS
        raise _TooLongError(f"takes more than {limit:g} s {what}{at}")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS),)
    timers += ((signal.SIGALRM, signal.ITIMER_REAL, WALL_SECONDS),)
    before = [signal.signal(number, stop) for number, _, _ in timers]
    try:
        for _, timer, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _memory(*, peak: bool) -> int:
    """Resident bytes now, or the largest number since the last reading."""
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else 0
