"""The results of a run: one JSON file, complete after every change, and its page."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import page
from .files import write_json


@dataclass
class Outcome:
    """A stage or a program: "running", "ok", "FAILED" or "out of time"."""

    name: str
    limit: float
    verdict: str = "running"
    seconds: float = 0.0
    status: int | None = None
    commands: list[Outcome] = field(default_factory=list)


class Results:
    """Outcomes of stages, and what their programs report.

    Args:
        out: folder of ``gpu_check.json`` and ``gpu_check.md``.
        command, budget: of the run.
    """

    def __init__(self, out: Path, command: str, budget: float) -> None:
        self.json, self.page = out / "gpu_check.json", out / "gpu_check.md"
        self._facts = {"command": command, "budget_s": budget}
        self.finished = False
        self.stages: list[Outcome] = []
        self.reports: dict[str, Any] = {}
        self._seen: dict[str, int] = {}

    def take(self, name: str, file: Path) -> None:
        """Copies what a program has reported so far, if it is new."""
        with contextlib.suppress(OSError, ValueError):
            changed = file.stat().st_mtime_ns
            if self._seen.get(name) != changed:
                self.reports[name] = json.loads(file.read_text())
                self._seen[name] = changed
                self.write()

    def as_dict(self) -> dict[str, Any]:
        stages = [asdict(stage) for stage in self.stages]
        return {**self._facts, "finished": self.finished, "stages": stages, **self.reports}

    def write(self) -> None:
        found = self.as_dict()
        write_json(self.json, found)
        self.page.write_text(page.page(found))
