"""Evaluate a trained model.

python train/evaluate.py COMMAND CHECKPOINT ... [key=value ...]
(--help lists commands; COMMAND --help, its options; keys are those of training)
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

if not __package__:  # started as a script
    from script import start

    start("train.evaluate")

from train import subcommands
from train.errors import exit_code
from train.evaluation import commands, ijb, megaface
from train.evaluation.embed import BATCH_SIZE
from train.subcommands import positive

COMMANDS = {
    "pairs": (commands.pairs, commands.PAIRS),
    "thresholds": (commands.thresholds, commands.THRESHOLDS),
    "verification": (commands.verification, commands.VERIFICATION),
    "ijbc": (ijb.evaluate, ijb.ARGUMENTS),
    "megaface": (megaface.evaluate, megaface.ARGUMENTS),
}
# Options of earlier versions that stand for keys.
ALIASES = {
    "--model": "model.name",
    "--device": "train.device",
    "--workers": "data.workers",
    "--on-error": "data.on_error",
}

COMMON: dict[str, dict[str, Any]] = {
    "checkpoint": {
        "type": Path,
        "help": "checkpoint file or folder, a run folder (its last one), or published weights",
    },
    "--batch-size": {"type": positive, "default": BATCH_SIZE, "help": "images embedded at a time"},
    "--out": {
        "type": Path,
        "help": "folder for metrics (JSON); pairs, thresholds and verification add plots",
    },
}


def parse(argv: list[str]) -> Namespace:
    keys, rest, given = list[str](), list[str](), iter(argv)
    for text in given:
        flag, equals, value = text.partition("=")
        if flag in ALIASES:
            keys.append(f"{ALIASES[flag]}={value if equals else next(given, '')}")
            print(f"warning: {flag} is deprecated, use {keys[-1]}", file=sys.stderr)
        else:
            rest.append(text)
    parser = subcommands.parser_of(
        COMMANDS,
        COMMON,
        prog="train/evaluate.py",
        about=str(__doc__).split("\n")[0],
        keys="data.on_error=skip data.workers=0",
    )
    return subcommands.parse(parser, [*keys, *rest])


def run(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    COMMANDS[arguments.command][0](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run))
