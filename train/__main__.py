"""Train a face-recognition backbone.

python train/main.py key=value ... [--config file.yaml ...] [--resume [auto | checkpoint]]
python train/main.py key=value ... [--config file.yaml ...] --dry-run
torchrun --nproc_per_node=2 train/main.py key=value ...

``python -m train`` and ``torchrun -m train`` do the same where the package can be imported.
"""

from __future__ import annotations

import sys

from train.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        from train.command import run  # imports Torch: an interrupt is reported here, too

        return run(sys.argv[1:] if argv is None else argv)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
