"""The user's cache folder, and in it folders whose files are executed: private, whole, checked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Between two attempts to lock what another process holds.
POLL_S = 0.05


class UnsafeFolderError(Exception):
    """Others than the user could put files into a folder; the message says how to mend it."""


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


def make_folder(path: Path) -> None:
    """Creates a folder for the user alone, and what it lies in; one that exists stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def private_folder(*names: str) -> Path:
    """The folder ``names`` below :func:`folder`, created if it is missing.

    What is written there is executed. So the cache folder and those below it must be real folders
    of this user, not writable by others, and the cache folder itself must not be exchangeable.

    Raises:
        UnsafeFolderError: that is not so.
        OSError: the folder cannot be created, or the user has none.
    """
    root = folder()
    if root is None:
        raise FileNotFoundError("the user has no home folder")
    path = Path(os.path.abspath(root))
    make_folder(path)
    # With links on the way: of these folders, too, another one could be put in the place.
    for above in (*path.parents, *path.resolve().parents):
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            _refuse(path, f"lies in {above}, to which everyone can write")
    _check_own(path)
    for name in names:
        path = path / name
        make_folder(path)
        _check_own(path)
    return path


def _check_own(path: Path) -> None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        _refuse(path, "is a symbolic link")
    if status.st_uid != os.geteuid():
        _refuse(path, f"belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _refuse(path, f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})")


def _refuse(path: Path, why: str) -> None:
    raise UnsafeFolderError(
        f"the cache folder {path} {why}, so nothing in it is executed; 'chmod 700' it, or set "
        "UNITSFACE_CACHE_DIR to a folder of your own"
    )


def write(path: Path, content: bytes) -> None:
    """Atomically: a reader gets the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def put(path: Path, content: bytes) -> None:
    """:func:`write` with a digest beside the file, for :func:`is_intact`."""
    write(path, content)
    write(_digest_path(path), hashlib.sha256(content).hexdigest().encode())


def is_intact(path: Path) -> bool:
    """Whether the file is there and as it was put."""
    try:
        return _digest_path(path).read_bytes() == (
            hashlib.sha256(path.read_bytes()).hexdigest().encode()
        )
    except OSError:
        return False


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@contextmanager
def only_one(path: Path, seconds: float) -> Iterator[None]:
    """Lets one process at a time make a file; another waits for it, for ``seconds`` at most.

    Only work is saved: files are written whole with or without this. Where files cannot be locked,
    no process waits.
    """
    with path.with_name(path.name + ".lock").open("ab") as file:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
            except OSError:
                break
        yield
