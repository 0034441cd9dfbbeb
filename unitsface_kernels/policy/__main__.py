"""``python -m unitsface_kernels.policy``: what becomes of formulas."""

from __future__ import annotations

import argparse
import sys

from .generate import generate


def _generate(options: argparse.Namespace) -> int:
    """Exit status 1 if ``--check`` finds a difference."""
    found = generate(check=options.check)
    for difference in found:
        print(difference)
    return int(options.check and bool(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unitsface_kernels.policy", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "generate", help="write the kernels of the package's own losses into its sources"
    )
    command.add_argument("--check", action="store_true", help="write nothing, name differences")
    command.set_defaults(run=_generate)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
