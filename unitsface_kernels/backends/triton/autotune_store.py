"""Results of searches on disk: one JSON file per device, Triton and package version."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

#: Of the file; raised when the meaning of its fields changes.
FORMAT = 1


def folder() -> Path | None:
    """``UNITSFACE_CACHE_DIR``, else ``unitsface_kernels`` in the user's cache folder.

    None if there is no such place: results then last as long as the process.
    """
    named = os.environ.get("UNITSFACE_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(base):
        return Path(base) / "unitsface_kernels"
    try:
        return Path.home() / ".cache" / "unitsface_kernels"
    except RuntimeError:  # no home
        return None


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
        """Also on disk. A file that cannot be written costs a warning, not the result."""
        self.entries[key] = entry
        if self.path is None:
            return
        # Another process may have added its own in the meantime.
        merged = {**self._read(), **self.entries}
        try:
            self._write(self.path, json.dumps({**self._head, "entries": merged}, indent=1))
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

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """Atomically: a reader gets the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path} {what}", RuntimeWarning, stacklevel=4)
