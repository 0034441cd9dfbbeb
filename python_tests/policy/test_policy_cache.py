"""The folder of files that are executed: whose it is, and whether its files are whole."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from unitsface_kernels import cache
from unitsface_kernels.cache import UnsafeFolderError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folders_are_the_users_alone(root: Path) -> None:
    before = os.umask(0)
    try:
        made = cache.private_folder("policies", "cpu")
    finally:
        os.umask(before)
    assert made == root / "policies" / "cpu"
    for path in (root, root / "policies", made):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert cache.private_folder("policies", "cpu") == made


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("place", ["", "policies"])
def test_a_folder_that_others_can_write_is_refused(root: Path, mode: int, place: str) -> None:
    cache.private_folder("policies")
    (root / place).chmod(mode)
    with pytest.raises(UnsafeFolderError, match=rf"written by others \(mode {mode:o}\)") as error:
        cache.private_folder("policies")
    assert "chmod 700" in str(error.value)
    assert str(root / place) in str(error.value)


@pytest.mark.parametrize("place", ["", "policies"])
def test_a_symbolic_link_is_refused(root: Path, tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if place:
        root.mkdir(mode=0o700)
    (root / place).symlink_to(elsewhere)
    with pytest.raises(UnsafeFolderError, match="is a symbolic link"):
        cache.private_folder("policies")
    assert list(elsewhere.iterdir()) == []


def test_a_folder_of_another_user_is_refused(root: Path, monkeypatch) -> None:
    cache.private_folder()
    owner = root.stat().st_uid
    monkeypatch.setattr(cache.os, "geteuid", lambda: owner + 1)
    with pytest.raises(UnsafeFolderError, match=f"belongs to user {owner}"):
        cache.private_folder()


def test_a_place_where_everyone_can_exchange_the_folder_is_refused(root: Path) -> None:
    """With the sticky bit, as of /tmp, only the owner can."""
    root.parent.chmod(0o777)
    with pytest.raises(UnsafeFolderError, match="everyone can write"):
        cache.private_folder()
    root.parent.chmod(0o1777)
    assert cache.private_folder() == root


def test_a_place_that_cannot_be_written_is_an_error_of_the_system(root: Path, monkeypatch) -> None:
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", "/proc/none")
    with pytest.raises(OSError, match="/proc/none"):
        cache.private_folder()
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(cache.Path, "home", homeless)
    with pytest.raises(OSError, match="no home folder"):
        cache.private_folder()


def test_files_are_whole(root: Path) -> None:
    path = cache.private_folder() / "file"
    assert not cache.is_intact(path)
    cache.put(path, b"content")
    assert cache.is_intact(path)
    path.write_bytes(b"conten")
    assert not cache.is_intact(path)
    cache.put(path, b"other")
    assert cache.is_intact(path)
    path.with_name("file.sha256").unlink()
    assert not cache.is_intact(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["file"]


def test_one_process_at_a_time_makes_a_file(root: Path) -> None:
    path, order = cache.private_folder() / "file", []

    def second() -> None:
        with cache.only_one(path, 60.0):
            order.append("second")

    with cache.only_one(path, 60.0):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(4 * cache.POLL_S)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_waiting_ends(root: Path) -> None:
    """For a process that was stopped while it made the file."""
    path = cache.private_folder() / "file"
    with cache.only_one(path, 60.0):
        start = time.monotonic()
        with cache.only_one(path, 2 * cache.POLL_S):
            waited = time.monotonic() - start
    assert waited >= 2 * cache.POLL_S
