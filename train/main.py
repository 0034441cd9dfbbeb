"""``python train/main.py`` and ``torchrun train/main.py`` are ``python -m train``."""

if __name__ == "__main__":
    from script import start

    start("train.__main__")

from train.__main__ import main
from train.command import load_config, parse_arguments, run

__all__ = ["load_config", "main", "parse_arguments", "run"]
