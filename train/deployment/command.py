"""Use a trained model: ``python -m train COMMAND ... [--checkpoint PATH] [key=value ...]``."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from train.config import Config, parse_overrides
from train.data.records import Files
from train.deployment.images import Embedded, open_any
from train.deployment.models import load, threshold_of
from train.deployment.vectors import Vectors, check_name, writing
from train.errors import Parser, UserError
from train.evaluation.embed import BATCH_SIZE
from train.evaluation.model import Model

_KEY = re.compile(r"[a-z_]+\.[\w.]+=", re.ASCII)


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


COMMON: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "type": Path,
        "default": Path(Config().run.dir),
        "metavar": "PATH",
        "help": "checkpoint, run folder (its last one), published weights, or an exported .onnx "
        "file; default: %(default)s",
    },
    "--flip": {
        "action": BooleanOptionalAction,
        "default": True,
        "help": "add the features of the mirror image, as evaluations do (default), or not",
    },
    "--batch-size": {"type": positive, "default": BATCH_SIZE, "help": "images embedded at a time"},
}
IMAGES = "folder of images, or of one sub-folder per identity, .rec, .tar, list of paths, or image"
EMBED: dict[str, dict[str, Any]] = {
    "images": {"help": IMAGES},
    "--out": {
        "type": Path,
        "required": True,
        "metavar": "FILE",
        "help": "x.npy, with names and identities in x.csv, or x.parquet",
    },
}

THRESHOLD: dict[str, Any] = {
    "type": float,
    "metavar": "COSINE",
    "help": "from which on two images count as one person; default: the unified threshold that "
    "the model has learned, else the best one for the identities held out of its run",
}
COMPARE: dict[str, dict[str, Any]] = {"image": {}, "other": {}, "--threshold": THRESHOLD}


def model_of(arguments: Namespace) -> Model:
    return load(arguments.checkpoint, arguments.overrides, arguments.batch_size, arguments.flip)


def embedded(images: str, model: Model) -> Embedded:
    return Embedded(model, open_any(images, skip=model.config.data.on_error == "skip"))


def embed(arguments: Namespace) -> None:
    """Unit features of images, with their names, identities and norms."""
    check_name(arguments.out)
    blocks = embedded(arguments.images, model_of(arguments))
    count = 0
    with writing(arguments.out) as add:
        for block in blocks:
            add(block)
            count += len(block)
    blocks.report()
    print(f"{arguments.out}: {count} features")


def compare(arguments: Namespace) -> None:
    """Two images: their cosine, and by a threshold whether they show the same person."""
    model = model_of(arguments)
    features, read = model.embed_records(Files([arguments.image, arguments.other]))
    if not read.all():  # data.on_error=skip
        raise UserError(f"cannot read {arguments.other if read[0] else arguments.image}")
    unit = Vectors.of(features, ("", ""), ("", "")).features
    cosine = float(unit[0] @ unit[1])
    print(f"cosine {cosine:.4f}")
    found = threshold_of(arguments.checkpoint, model, arguments.threshold)
    if found is None:
        print("no verdict: the model has learned no threshold; name one by --threshold")
    else:
        verdict = "the same person" if cosine >= found[0] else "different people"
        print(f"{verdict}: threshold {found[0]:.4f}, {found[1]}")


COMMANDS = {"embed": (embed, EMBED), "compare": (compare, COMPARE)}


def run(argv: list[str]) -> int:
    parser = Parser(prog="python -m train", description=str(__doc__).split(":")[0])
    listed = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (command, options) in COMMANDS.items():
        about = str(command.__doc__)
        sub = listed.add_parser(
            name,
            help=about.split("\n")[0].rstrip("."),
            description=about,
            epilog="key=value: as in training, such as data.on_error=skip train.device=cpu",
        )
        for flag, settings in {**options, **COMMON}.items():
            sub.add_argument(flag, **settings)
    arguments = parser.parse_args([text for text in argv if not _KEY.match(text)])
    arguments.overrides = [text for text in argv if _KEY.match(text)]
    parse_overrides(arguments.overrides)  # a mistake is found before a checkpoint is read
    COMMANDS[arguments.command][0](arguments)
    return 0
