"""Judge a trained model.

python train/evaluate.py COMMAND CHECKPOINT ... (--help lists commands; COMMAND --help, its options)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if not __package__:  # started as a script: sys.path[0] is train/, the package is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.errors import Parser, UserError, exit_code

# What messages say in terms of training, in terms of these commands.
FLAGS = {
    "data.on_error=skip": "--on-error skip",
    "data.workers=0": "--workers 0",
    "train.device=cuda": "--device cuda",
}
# Modules of train.evaluation.commands: HELP, add_arguments(parser) and run(arguments).
COMMANDS = ("pairs", "thresholds", "verification", "ijbc", "megaface")


def run(argv: list[str]) -> int:
    from train.evaluation.model import add_model_arguments

    parser = Parser(prog="train/evaluate.py", description="Judge a trained model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {
        name: importlib.import_module(f"train.evaluation.commands.{name}") for name in COMMANDS
    }
    for name, module in modules.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        add_model_arguments(sub)
        module.add_arguments(sub)
    arguments = parser.parse_args(argv)
    try:
        return int(modules[arguments.command].run(arguments))
    except UserError as error:
        message = str(error).removeprefix("data.path: ")
        for key, flag in FLAGS.items():
            message = message.replace(key, flag)
        raise UserError(message) from error


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))
