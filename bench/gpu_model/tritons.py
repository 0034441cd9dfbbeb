"""The Tritons that kernels are compiled with: the installed one and others that lie unpacked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Triton:
    """``path``: folder to import it from before any other; None: the installed one."""

    version: str
    path: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that imports it, without this process's Triton settings."""
        found = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        if self.path is not None:
            found["PYTHONPATH"] = os.pathsep.join(
                [str(self.path), *filter(None, [found.get("PYTHONPATH")])]
            )
        return found


def _version(package: Path) -> str:
    found = re.search(r"""__version__ = ['"]([^'"]+)""", (package / "__init__.py").read_text())
    assert found is not None, f"{package} has no version"
    return found[1]


def unpacked() -> list[Path]:
    """Folder of the Triton that most GPU servers have, unpacked by ``make env``."""
    return sorted(Path(sys.prefix).glob("triton-*"))


def tritons(others: Iterable[Path] = ()) -> list[Triton]:
    """The installed one first, if there is any; one of each version."""
    spec = find_spec("triton")
    found: dict[str, Triton] = {}
    if spec is not None and spec.origin is not None:
        version = _version(Path(spec.origin).parent)
        found[version] = Triton(version, None)
    for path in others:
        version = _version(path / "triton")
        found.setdefault(version, Triton(version, path.resolve()))
    return list(found.values())
