"""The line of a run's progress: on a terminal of any width, and in a log."""

from __future__ import annotations

import fcntl
import io
import os
import select
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.training import ROOT  # noqa: F401

from train.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(bar: Progress, clock: Clock, count: int, seconds: float) -> None:
    for _ in range(count):
        clock.now += seconds
        bar.update()
        bar.set_postfix_str(f"loss {bar.step / 10:.1f}, b/s 0.300, 512 images/s")


def test_a_log_has_a_line_every_few_seconds_and_no_control_characters() -> None:
    clock, log = Clock(), io.StringIO()
    bar = Progress(400, stream=log, clock=clock)
    steps(bar, clock, 400, 0.25)
    bar.close()
    lines = log.getvalue().split("\n")
    assert len(lines) == 21  # of 100 s, and the end of the last
    assert lines.pop() == ""
    assert log.getvalue().replace("\n", "").isprintable()
    assert lines[9] == "step 200/400   50 %  ETA 0:00:50  loss 19.9, b/s 0.300, 512 images/s"
    assert lines[-1] == "step 400/400  100 %  loss 40.0, b/s 0.300, 512 images/s"


def test_the_log_of_a_day_is_short() -> None:
    clock, log = Clock(), io.StringIO()
    bar = Progress(86400, stream=log, clock=clock)
    steps(bar, clock, 86400, 1.0)
    bar.close()
    assert 400 < len(log.getvalue().splitlines()) < 800
    assert "ETA 22:" in log.getvalue()


def test_a_resumed_run_has_the_pace_of_its_own_steps_but_the_first() -> None:
    clock, log = Clock(), io.StringIO()
    bar = Progress(1000, 900, stream=log, clock=clock)
    steps(bar, clock, 1, 500.0)  # it compiles
    steps(bar, clock, 9, 2.0)
    assert "step 910/1000" in bar.line()
    assert "ETA 0:03:00" in bar.line()
    bar.close()
    assert "step 910/1000   91 %  ETA 0:03:00  loss " in log.getvalue().splitlines()[-1]


@contextmanager
def terminal(columns: int) -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A stream that is a terminal, and the descriptor from which its output is read."""
    outside, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(inside, "w", encoding="utf-8") as stream:
        yield stream, outside
    os.close(outside)


def output(outside: int) -> str:
    """All that has been written; a terminal hands it over in pieces."""
    found = b""
    while select.select([outside], [], [], 0.1)[0]:
        found += os.read(outside, 1 << 16)
    return found.decode()


def frames(outside: int) -> list[str]:
    return output(outside).split("\r")


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_a_terminal_has_one_line_of_its_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    with terminal(columns) as (stream, outside):
        bar = Progress(10, stream=stream, clock=clock)
        steps(bar, clock, 10, 1.0)
        found = frames(outside)
        assert len(found) == 11  # each begins at the left
        assert all("\n" not in frame for frame in found)
        shown = [frame.removesuffix("\x1b[K") for frame in found[1:]]
        assert max(map(len, shown)) < columns
        assert ("━" in shown[-1]) == (columns > 70)
        assert "step 5/10" in shown[4]
        if columns == 80:
            assert "ETA 0:00:05  loss 0.4, b/s 0.300, 512 images/s" in shown[4]
        bar.write("step 10, lfw: accuracy 0.9")  # the line is drawn anew below it
        assert capsys.readouterr().out == "step 10, lfw: accuracy 0.9\n"
        assert "step 10/10" in frames(outside)[-1]
        fcntl.ioctl(outside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        bar.close()
        found = frames(outside)  # the terminal sends "\r\n" for an end of line
        assert found[-1] == "\n"
        assert len(found[-2].removesuffix("\x1b[K")) == 19


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_no_terminal_or_not_wanted_has_no_frames(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    clock = Clock()
    with terminal(80) as (stream, outside):
        bar = Progress(10, stream=stream, clock=clock, enabled=enabled)
        steps(bar, clock, 10, 0.01)
        bar.close()
        stream.write(".")
        stream.flush()
        expected = "step 10/10  100 %  loss 1.0, b/s 0.300, 512 images/s\r\n." if enabled else "."
        assert output(outside) == expected
