"""Configurations: damaged YAML files, and values typed for keys of every type."""

from __future__ import annotations

import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

from fuzz.mutation import mutate, outcome
from train.config import (
    COMMAND_LINE,
    Config,
    iter_keys,
    make_config,
    parse_overrides,
    read_yaml,
    to_dict,
    to_yaml,
)
from train.errors import UserError

_SHIPPED = sorted((Path(__file__).resolve().parents[2] / "train" / "configs").rglob("*.yaml"))
_FILES = [to_yaml(Config()).encode(), *(path.read_bytes() for path in _SHIPPED)]
_TOKENS = (
    *(b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"!!set ", b"? ", b": "),
    *(
        b"${oc.env:HOME}",
        b"${run.dir}",
        b"${",
        b"???",
        b"- ",
        b"| ",
        b"> ",
        b"#",
        b"'",
        b'"',
        b"\t",
    ),
    *(b"null", b"~", b"yes", b".nan", b".inf", b"1:30", b"2020-01-01", b"0x1F", b"%YAML 9.9\n"),
    *(
        b"---\n",
        b"...\n",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        "é\u2028\x85".encode(),
        b"run:\n",
        b"{",
        b"}",
    ),
)
_TEXT_KEYS = [key for key, f in iter_keys() if f.type == "str" and not f.metadata["choices"]]
_TYPED = (
    *(
        "#",
        "a #b",
        "007",
        "1e3",
        "yes",
        "null",
        "~",
        "[a]",
        "{a: b}",
        "${x}",
        "${oc.env:HOME}",
        " a ",
    ),
    *("é", "a=b", "a:b", "a: b", "- a", "*a", "&a", "!a", "%a", "@a", "`a`", "0x10", "2020-01-01"),
    *(
        "'",
        '"',
        "a'b",
        "\\",
        "\\n",
        "\n",
        "\t",
        "\x85",
        "\u2028",
        "\ud800",
        "\x07",
        ".",
        "-",
        "|",
        ">",
    ),
)


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    return rng.choice((_file, _file, _argument, _text))(rng)


def _file(rng: random.Random) -> str | None:
    data = mutate(rng.choice(_FILES), rng, others=_FILES, tokens=_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(data)
        return outcome(lambda: _round_trip((str(path), read_yaml(path))), (UserError,))


def _argument(rng: random.Random) -> str | None:
    """Any value for any key, or for one that is nearly a key."""
    key = rng.choice([key for key, _ in iter_keys()]) + rng.choice(("", "", "", ".a", ".a.b"))
    value = rng.choice(("0.1", "[1,2]", "{a: 1, b: [x, 'y']}", "true", "abc", "1e-3")).encode()
    item = f"{key}={mutate(value, rng, tokens=_TOKENS).decode(errors='surrogateescape')}"
    if rng.random() < 0.1:
        item = mutate(item.encode(errors="surrogateescape"), rng).decode(errors="surrogateescape")
    return outcome(lambda: _round_trip((COMMAND_LINE, parse_overrides([item]))), (UserError,))


def _round_trip(*layers: tuple[str, dict[str, Any]]) -> None:
    """Accepted values are written and read back unchanged."""
    config = make_config(*layers)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        # The name of a model that is fetched is taken from the command line alone.
        name = {"model": {"name": config.model.name}}
        again = make_config((str(path), read_yaml(path)), (COMMAND_LINE, name))
    if repr(to_dict(again)) != repr(to_dict(config)):
        raise AssertionError(f"another configuration after writing: {_first(config, again)}")


def _first(config: Config, again: Config) -> str:
    ours, theirs = to_dict(config), to_dict(again)
    for section, entries in ours.items():
        for name, value in entries.items():
            if repr(value) != repr(theirs[section][name]):
                return f"{section}.{name}={value!r}, then {theirs[section][name]!r}"
    return "its order"


def _text(rng: random.Random) -> str | None:
    """The text given for a string key is its value, on the command line and in a file."""
    key = rng.choice(_TEXT_KEYS)
    text = "".join(rng.choice(_TYPED) for _ in range(rng.choice((1, 1, 2, 3, 8))))
    if key == "model.name":
        text = f"timm:{text}"
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return None  # quotes around all of it are no part of it
    section, name = key.split(".")

    def check() -> None:
        values = parse_overrides([f"{key}={text}"])
        if values[section][name] != text:
            raise AssertionError(f"{key}: typed {text!r}, got {values[section][name]!r}")
        _round_trip((COMMAND_LINE, values))

    return outcome(check, (UserError,))
