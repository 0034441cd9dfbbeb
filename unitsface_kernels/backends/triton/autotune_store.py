"""Results of searches on disk: one JSON file per device, Triton and package version."""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from ...cache import make_folder, write

#: Of the file; raised when the meaning of its fields changes.
FORMAT = 1


class Store:
    """Entries of one environment.

    Attributes:
        path: the file, named after the environment: another version never reads it; None: no
            file.
    """

    def __init__(self, folder: Path | None, environment: dict[str, str]) -> None:
        self._head = {"format": FORMAT, "environment": environment}
        text = json.dumps(self._head, sort_keys=True)
        name = f"triton-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.path = None if folder is None else folder / name

    @cached_property
    def entries(self) -> dict[str, Any]:
        """Entries of the file at its first reading, and those added since."""
        return self._read()

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Adds an entry, also on disk; a file that cannot be written is a warning."""
        self.entries[key] = entry
        if self.path is None:
            return
        # Another process may have added its own in the meantime.
        merged = {**self._read(), **self.entries}
        try:
            text = json.dumps({**self._head, "entries": merged}, indent=1)
            make_folder(self.path.parent)
            write(self.path, f"{text}\n".encode())
        except OSError as error:
            self._warn(f"cannot be written ({error}); results last as long as this process")

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._warn(f"cannot be read ({error}); ignored")
            return {}
        if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
            self._warn("is not a file of results; ignored")
            return {}
        if {name: content.get(name) for name in self._head} != self._head:
            self._warn("belongs to another device or version; ignored")
            return {}
        return content["entries"]

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path} {what}", RuntimeWarning, stacklevel=4)
