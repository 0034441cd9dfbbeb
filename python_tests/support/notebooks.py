"""Notebooks run as plain Python: their code cells one after another, in one namespace."""

from __future__ import annotations

import json
import linecache
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path: Path) -> dict[str, Any]:
    """The names that a notebook's cells leave behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(code_cells(path)):
        # As a notebook's server does it: lines are known, and named in errors.
        file = f"<cell {number} of {path.name}>"
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        exec(compile(code, file, "exec"), names)
    return names
