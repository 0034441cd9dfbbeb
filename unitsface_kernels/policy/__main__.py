"""``python -m unitsface_kernels.policy``: kernels of formulas, written or shown."""

from __future__ import annotations

import argparse
import importlib
import sys

from .definition import Policy
from .generate import generate
from .show import shown


def _generate(options: argparse.Namespace) -> int:
    """Exit status 1 if ``--check`` finds a difference, 2 without the package's sources."""
    try:
        found = generate(check=options.check)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    for difference in found:
        print(difference)
    return int(options.check and bool(found))


def _show(options: argparse.Namespace) -> int:
    module, _, name = options.policy.partition(":")
    try:
        found = getattr(importlib.import_module(module), name or "", None)
    except (ImportError, TypeError, ValueError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    if not (isinstance(found, type) and issubclass(found, Policy)) or not hasattr(found, "formula"):
        print(f"policy must be module:Class of a policy, got {options.policy!r}", file=sys.stderr)
        return 2
    print(shown(found.formula))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unitsface_kernels.policy", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "generate", help="write the kernels of the package's own losses into its sources"
    )
    command.add_argument("--check", action="store_true", help="write nothing, name differences")
    command.set_defaults(run=_generate)
    command = commands.add_parser("show", help="print a policy's derivatives and kernels")
    command.add_argument("policy", metavar="module:Class")
    command.set_defaults(run=_show)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
