"""Fixtures of losses that are compiled at run time."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.compiled import forget


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of a process that has compiled nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", str(folder))
    for name in ("UNITSFACE_POLICY_COMPILER", "CXX"):
        monkeypatch.delenv(name, raising=False)
    forget(monkeypatch)
    return folder
