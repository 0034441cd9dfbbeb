"""Results of searches for launch configurations, on disk."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from unitsface_kernels import cache
from unitsface_kernels.backends.triton.autotune_store import Store

HERE = {"unitsface_kernels": "1", "triton": "3.6", "device": "some GPU", "capability": "9.0"}


@pytest.mark.parametrize("field", list(HERE))
def test_another_version_or_device_has_a_file_of_its_own(tmp_path: Path, field: str) -> None:
    mine, other = Store(tmp_path, HERE), Store(tmp_path, HERE | {field: "another"})
    mine.add("key", {"seconds": 1.0})
    assert other.entries == {}
    other.add("key", {"seconds": 2.0})
    assert Store(tmp_path, HERE).entries == {"key": {"seconds": 1.0}}


def test_processes_keep_each_others_results(tmp_path: Path) -> None:
    first, second = Store(tmp_path, HERE), Store(tmp_path, HERE)
    assert first.entries == second.entries == {}
    first.add("a", {"seconds": 1.0})
    second.add("b", {"seconds": 2.0})
    assert set(Store(tmp_path, HERE).entries) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ not json", "cannot be read"),
        ("\x00\xff", "cannot be read|not a file of results"),
        ("[]", "not a file of results"),
        ('{"entries": 3}', "not a file of results"),
        ('{"format": 1, "environment": {"device": "x"}, "entries": {}}', "another device"),
        ('{"format": 0, "environment": {}, "entries": {}}', "another device or version"),
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_and_replaced(
    tmp_path: Path, text: str, message: str
) -> None:
    store = Store(tmp_path, HERE)
    assert store.path is not None
    store.path.write_text(text, encoding="latin-1")
    with pytest.warns(RuntimeWarning, match=message):
        assert store.entries == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.add("key", {"seconds": 1.0})
    assert Store(tmp_path, HERE).entries == {"key": {"seconds": 1.0}}


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNITSFACE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "unitsface_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.folder() == tmp_path / ".cache" / "unitsface_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "unitsface_kernels"
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", "~/mine")
    assert cache.folder() == tmp_path / "mine"
