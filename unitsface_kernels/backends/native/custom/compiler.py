"""The system's C++ compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: A policy takes seconds; a compiler that takes longer hangs.
TIMEOUT_S = 120.0
VERSION_TIMEOUT_S = 10.0
LONGEST_MESSAGE = 200
COMMANDS = ("c++", "g++", "clang++")
#: What a policy needs beside the options of the extension's own kernels. Its functions must not be
#: exchanged for those of another shared object.
OPTIONS = ("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")


class CompilerError(Exception):
    """There is no compiler, or it fails; the message is one line."""


@dataclass(frozen=True)
class Compiler:
    """A compiler by its command.

    Attributes:
        identity: output of ``--version``.
    """

    command: tuple[str, ...]
    identity: str

    def compile(
        self, source: Path, target: Path, flags: Sequence[str], folders: Sequence[Path]
    ) -> None:
        """Makes the shared object ``target``.

        Raises:
            CompilerError: it fails or hangs.
        """
        includes = (f"-I{folder}" for folder in folders)
        options = [*flags, *OPTIONS, *includes, str(source), "-o", str(target)]
        _run([*self.command, *options], TIMEOUT_S)


def find_compiler() -> Compiler:
    """``UNITSFACE_POLICY_COMPILER``, else ``CXX``, else the first of ``COMMANDS`` that is there.

    Raises:
        CompilerError: there is none, or the environment turns it off.
    """
    named = next(
        (n for n in ("UNITSFACE_POLICY_COMPILER", "CXX") if os.environ.get(n, "").strip()), None
    )
    if named is None:
        found = next(filter(None, map(shutil.which, COMMANDS)), None)
        if found is None:
            raise CompilerError("there is no C++ compiler: install g++ or clang++, or set CXX")
        command = [found]
    else:
        value = os.environ[named]
        if value == "off":
            raise CompilerError(f"{named}=off")
        try:
            command = shlex.split(value)
        except ValueError as error:
            raise CompilerError(f"{named}={value} is no command ({error})") from None
        if shutil.which(command[0]) is None:
            raise CompilerError(f"{named}={value}: there is no {command[0]}")
    return Compiler(tuple(command), _run([*command, "--version"], VERSION_TIMEOUT_S))


def _run(command: list[str], seconds: float) -> str:
    """Output of a command, which runs without a shell; it is ended with all that it started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run ({error.strerror})") from None
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise CompilerError(f"{command[0]} did not end within {seconds:g} s") from None
    if process.returncode:
        raise CompilerError(
            f"{command[0]} fails with exit code {process.returncode}: {_cause(errors)}"
        )
    return output


def _end(process: subprocess.Popen[str]) -> None:
    # Its session's processes have its number as their group; it is not reaped yet.
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _cause(errors: str) -> str:
    """The first line that names an error, shortened."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    cause = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return cause if len(cause) <= LONGEST_MESSAGE else cause[:LONGEST_MESSAGE] + " ..."
