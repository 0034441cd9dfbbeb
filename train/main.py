"""``python train/main.py`` and ``torchrun train/main.py``: ``python -m train`` from any folder."""

import sys
from pathlib import Path

if not __package__:  # started as a script: sys.path[0] is train/, the package is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.__main__ import load_config, main, parse_arguments, run

__all__ = ["load_config", "main", "parse_arguments", "run"]

if __name__ == "__main__":
    sys.exit(main())
