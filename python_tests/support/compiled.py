"""Losses that are compiled at run time, and compilers that are watched."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unitsface_kernels.backends.native import custom, loader
from unitsface_kernels.backends.native.custom import compiler
from unitsface_kernels.losses import LossSpec

COMPILER = next(filter(None, map(shutil.which, compiler.COMMANDS)), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of compiled losses in this process; the extension keeps those that it has."""
    monkeypatch.setattr(custom, "_failures", {})


@contextmanager
def without_compiler() -> Iterator[None]:
    """Losses outside the registry run tile by tile in operations of Torch: nothing is compiled."""
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
        forget(monkeypatch)
        warnings.filterwarnings("ignore", ".*UNITSFACE_POLICY_COMPILER.*", RuntimeWarning)
        yield


def failure(spec: LossSpec) -> str | None:
    return custom.failure(spec, loader.extension())


def shared_objects(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def counting(path: Path) -> tuple[str, Path]:
    """A compiler that leaves a line for every compilation, and the file of these."""
    log = path / "compilations"
    log.touch()
    text = f'case "$*" in *--version*) ;; *) echo 1 >> {log};; esac\nexec {COMPILER} "$@"'
    return script(path / "counting-compiler", text), log
