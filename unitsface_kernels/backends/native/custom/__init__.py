"""CPU kernels of users' losses: compiled at their first use, kept in the user's cache folder."""

from __future__ import annotations

import os
import threading
from types import ModuleType

from ....cache import UnsafeFolderError, private_folder
from ....losses import LossSpec
from ....policy import FormulaError
from . import shared_object
from .compiler import CompilerError, find_compiler

_lock = threading.Lock()
_failures: dict[str, str | None] = {}


def failure(spec: LossSpec, native: ModuleType) -> str | None:
    """Why there are no CPU kernels of a loss with a formula; None if there are, from now on.

    The first call of a process compiles them, or loads what an earlier one has compiled. Its
    result is kept.
    """
    if spec.reduction == "nearest":
        return None  # its tiles are a search, and its formula runs on N x k numbers
    if os.environ.get("UNITSFACE_POLICY_COMPILER") == "off":
        return "UNITSFACE_POLICY_COMPILER=off"
    if spec.name not in _failures:
        with _lock:
            if spec.name not in _failures:
                _failures[spec.name] = _load(spec, native)
    return _failures[spec.name]


def description(native: ModuleType) -> str:
    """The compiler of losses and the folder of its results; or why none are compiled."""
    try:
        found = find_compiler()
        place = f"kept in {private_folder(*shared_object.folder_names(native, found))}"
    except (CompilerError, UnsafeFolderError) as error:
        return f"not compiled: {error}"
    except OSError as error:
        place = f"by each process ({error})"
    return f"compiled by {' '.join(found.command)}, {place}"


def _load(spec: LossSpec, native: ModuleType) -> str | None:
    try:
        shared_object.load(spec, native, find_compiler())
    except (CompilerError, FormulaError, UnsafeFolderError, shared_object.LoadError) as error:
        return str(error)
    return None
