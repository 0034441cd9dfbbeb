"""Mistakes a user can fix, and what a command says about them."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2
LOST_PROCESS = 3
INTERRUPTED = 130
LONGEST = 2000  # characters of a message
# A disk that is full, over its quota, or was made read-only, which any write may come upon.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(Exception):
    """Shown as a single ``error: ...`` line with its exit code, never as a traceback."""

    code = USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: object) -> str:
    """In one line that a terminal shows, whatever names and contents of files are in it."""
    text = _shortened(" ".join(str(message).split()))
    return text if text.isprintable() else _shortened("".join(map(_shown, text)))


def _shortened(text: str) -> str:
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class DivergedError(UserError):
    """The loss of a run is no longer a number."""


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer; what it said itself says why."""

    code = LOST_PROCESS


class Parser(argparse.ArgumentParser):
    """Wrong arguments are user errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; its exit code, with user errors reported in one line."""
    try:
        code = command()
        sys.stdout.flush()  # here, where what it raises is one line
        return code
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # whoever read what is printed has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
