"""Progress of a run: one line drawn anew on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

FRAME_S = 0.1
# Without a terminal; later a hundredth of the time so far, which keeps the log of a day short.
LINE_S = 5.0
LONGEST_BAR = 30


class Progress:
    """Steps done and to come, the time that these take, and what is known of the training."""

    def __init__(
        self,
        total: int,
        step: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.step, self.enabled, self.clock = total, step, enabled, clock
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.text = ""
        self.began = self.drawn = clock()
        self.drawn_step: int | None = None
        # The first step takes longer than others: kernels are compiled, caches filled.
        self.first: tuple[float, int] | None = None

    def update(self) -> None:
        """A step is done."""
        self.step += 1
        now = self.clock()
        self.first = self.first or (now, self.step)
        pause = FRAME_S if self.terminal else max(LINE_S, (now - self.began) / 100)
        # The last line of a log waits for the last loss.
        if now - self.drawn >= pause and (self.terminal or self.step < self.total):
            self._draw()

    def set_postfix_str(self, text: str) -> None:
        """Text to be shown after the steps from now on."""
        self.text = text

    def write(self, line: str) -> None:
        """Print a line on standard output; the progress line moves below it."""
        shown = self.enabled and self.terminal and self.drawn_step is not None
        if shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
        print(line, flush=True)
        if shown:
            self._draw()

    def close(self) -> None:
        """Leave the last step on the screen, or in the log."""
        if self.enabled and self.step and (self.terminal or self.drawn_step != self.step):
            self._draw()
        if self.enabled and self.terminal and self.drawn_step is not None:
            self.stream.write("\n")
            self.stream.flush()

    def line(self, width: int | None = None) -> str:
        """Cut at ``width`` columns, with a bar where they leave room for one."""
        share = self.step / max(1, self.total)
        parts = [f"step {self.step}/{self.total}", f"{100 * share:3.0f} %", self._eta(), self.text]
        text = "  ".join(filter(None, parts))
        if width is None:
            return text
        room = min(LONGEST_BAR, width - len(text) - 2)
        if room >= 5:
            cells = "━─" if "utf" in (self.stream.encoding or "").lower() else "#-"
            done = math.floor(room * share)
            return f"{cells[0] * done}{cells[1] * (room - done)}  {text}"
        return text[:width]

    def _eta(self) -> str:
        """Time to the end at the mean pace of this process, evaluations included."""
        if self.first is None or self.step <= self.first[1] or self.step >= self.total:
            return ""
        seconds = (self.clock() - self.first[0]) / (self.step - self.first[1])
        minutes, seconds = divmod(round(seconds * (self.total - self.step)), 60)
        return f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def _draw(self) -> None:
        if not self.enabled:
            return
        self.drawn, self.drawn_step = self.clock(), self.step
        if self.terminal:
            try:
                width = os.get_terminal_size(self.stream.fileno()).columns
            except OSError:
                width = 80
            # A full last column would move the cursor to the next line.
            self.stream.write(f"\r{self.line((width or 80) - 1)}\x1b[K")
        else:
            self.stream.write(self.line() + "\n")
        self.stream.flush()
