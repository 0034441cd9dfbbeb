"""Train a face-recognition backbone.

python train/main.py key=value ... [--config file.yaml ...] [--resume [auto | checkpoint]]
python train/main.py key=value ... [--config file.yaml ...] --dry-run
torchrun --nproc_per_node=2 train/main.py key=value ...

``python -m train`` and ``torchrun -m train`` do the same where the package can be imported.

python -m train {embed | compare | enroll | search | clean} ... uses a trained model (--help).
python -m train convert ... converts weights from other programs, and to insightface's names.
"""

from __future__ import annotations

import sys

from train.errors import UserError, exit_code

COMMANDS = ("embed", "compare", "enroll", "search", "clean")  # of train/deployment


def run(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    # Commands import Torch: an interrupt is reported here, too.
    if given[:1] == ["convert"]:
        from train.tools.convert import run

        return run(given[1:])
    if given and given[0] in COMMANDS:
        from train.deployment.command import run
    elif given and given[0].isidentifier():
        known = ", ".join((*COMMANDS, "convert"))
        raise UserError(f"unknown command '{given[0]}'; commands: {known}; to train: key=value")
    else:
        from train.command import run
    return run(given)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
