"""Start of the scripts in this folder: ``python train/x.py`` is ``python -m train.tools.x``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def start(module: str) -> None:
    """Run ``run()`` of a module of this package and exit with its code."""
    # A script's own folder stands first on the path, where the package's parent belongs.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from train.errors import exit_code

    # Imports take seconds, in which an interrupt is one line, too.
    sys.exit(exit_code(lambda: importlib.import_module(module).run()))
