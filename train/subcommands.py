"""Command lines of several commands, with ``key=value`` of the configuration among arguments."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Any

from train.config import parse_overrides
from train.errors import Parser

Options = Mapping[str, dict[str, Any]]  # arguments of ``add_argument`` by flag or name
Commands = Mapping[str, tuple[Callable[[Namespace], None], Options]]
_KEY = re.compile(r"[a-z_]+\.[\w.]+=", re.ASCII)


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def parser_of(commands: Commands, common: Options, *, prog: str, about: str, keys: str) -> Parser:
    """The parser of several commands; ``keys`` are examples."""
    parser = Parser(prog=prog, description=about)
    listed = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, options) in commands.items():
        described = str(run.__doc__)
        sub = listed.add_parser(
            name,
            help=described.split("\n")[0].rstrip("."),
            description=described,
            epilog=f"key=value: as in training, such as {keys}",
        )
        for flag, settings in {**common, **options}.items():
            sub.add_argument(flag, **settings)
    return parser


def parse(parser: Parser, argv: list[str]) -> Namespace:
    """The arguments, and the keys as ``overrides``: one that is wrong is found here."""
    found = parser.parse_args([text for text in argv if not _KEY.match(text)])
    found.overrides = [text for text in argv if _KEY.match(text)]
    parse_overrides(found.overrides)
    return found
