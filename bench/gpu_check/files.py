"""Files of results: replaced at once, and kept small."""

from __future__ import annotations

import json
import os
from pathlib import Path

LARGEST_LOG = 1_000_000
HEAD, TAIL = 100_000, 800_000


def write_json(path: Path, value: object) -> None:
    """Replaces a file at once: a reader or a copy finds a complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def trim(log: Path) -> None:
    """Keeps the start and the end of a long log."""
    if log.exists() and log.stat().st_size > LARGEST_LOG:
        data = log.read_bytes()
        log.write_bytes(data[:HEAD] + b"\n... cut ...\n" + data[-TAIL:])
