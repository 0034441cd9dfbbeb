"""One process at a time writes a run folder."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from train.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where two starts in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: set[int] = set()


def _close_in_child() -> None:
    """A lock is held as long as any copy of its descriptor is open."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Held from :meth:`take` until :meth:`release`, or until the process ends, however it does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.descriptor: int | None = None

    def take(self) -> None:
        """Raises a UserError where another process, or another run of this one, has the folder."""
        if fcntl is None or self.descriptor is not None:
            return
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"run.dir: {self.path.parent} is being written by another run"
                    f"{f' ({holder})' if holder else ''}; choose another run.dir"
                ) from error
            except OSError:  # a file system without locks
                os.close(descriptor)
                return
            # The holder before may have removed the file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(descriptor)
        self.descriptor = descriptor

    def release(self) -> None:
        if self.descriptor is not None:
            self.path.unlink(missing_ok=True)
            _held.discard(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
