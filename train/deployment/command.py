"""Use a trained model: ``python -m train COMMAND ... [--checkpoint PATH] [key=value ...]``."""

from __future__ import annotations

import csv
import sys
from argparse import BooleanOptionalAction, Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from train import subcommands
from train.config import Config
from train.data.records import Files
from train.deployment import cleaning, gallery
from train.deployment.images import BLOCK, Embedded, open_any
from train.deployment.models import load, threshold_of
from train.deployment.vectors import Vectors, check_name, open_text, read, writing
from train.errors import UserError
from train.evaluation.embed import BATCH_SIZE
from train.evaluation.model import Model
from train.subcommands import positive

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

GALLERY = {"type": Path, "metavar": "FILE", "help": "x.npy, which has x.csv beside it"}
ENROLL: dict[str, dict[str, Any]] = {
    "people": {"help": IMAGES},
    "--gallery": {**GALLERY, "required": True},
    "--name": {"help": "of the person whom all images show; default: their sub-folders' names"},
}
SEARCH: dict[str, dict[str, Any]] = {
    "queries": {"help": f"{IMAGES}, or features that embed has written"},
    "--gallery": {**GALLERY, "required": True},
    "--top": {"type": positive, "default": 5, "metavar": "K", "help": "per query (%(default)s)"},
    "--threshold": THRESHOLD,
    "--faiss": {"metavar": "INDEX", "help": "search by such an index (Flat, HNSW32) of FAISS"},
    "--out": {"type": Path, "metavar": "FILE", "help": "table separated by tabs; default: stdout"},
}
CLEAN: dict[str, dict[str, Any]] = {
    "images": {"help": f"{IMAGES}, or features that embed has written"},
    "--threshold": THRESHOLD,
    "--out": {"type": Path, "metavar": "FILE", "help": "all findings, x.csv or x.json"},
}


def model_of(arguments: Namespace) -> Model:
    default = arguments.checkpoint == COMMON["--checkpoint"]["default"]
    if default and not arguments.checkpoint.exists():
        raise UserError(f"no run in {arguments.checkpoint}; name a model by --checkpoint PATH")
    return load(arguments.checkpoint, arguments.overrides, arguments.batch_size, arguments.flip)


def embedded(images: str, model: Model) -> Embedded:
    return Embedded(model, open_any(images, skip=model.config.data.on_error == "skip"))


def write_features(images: str, model: Model, out: Path) -> int:
    """The number of images whose features are in the file."""
    blocks, count = embedded(images, model), 0
    with writing(out) as add:
        for block in blocks:
            add(block)
            count += len(block)
    blocks.report()
    return count


def embed(arguments: Namespace) -> None:
    """Unit features of images, with their names, identities and norms."""
    check_name(arguments.out, ".npy", ".parquet")
    count = write_features(arguments.images, model_of(arguments), arguments.out)
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


def enroll(arguments: Namespace) -> None:
    """Add people to a gallery, or replace those of the same names."""
    check_name(arguments.gallery, ".npy")
    blocks = embedded(arguments.people, model_of(arguments))
    if arguments.name is not None:
        names = [arguments.name]
        blocks.images = replace(blocks.images, labels=0 * blocks.images.labels, identities=names)
    people = gallery.templates(blocks)
    replaced, count = gallery.enroll(arguments.gallery, people)
    blocks.report()
    enrolled = "1 person" if len(people) == 1 else f"{len(people)} people"
    print(f"{arguments.gallery}: {enrolled} enrolled, {replaced} replaced, {count} in all")


def search(arguments: Namespace) -> None:
    """The nearest people or images of a gallery for every query, by exact cosines."""
    known = read(arguments.gallery)
    k = min(arguments.top, len(known))
    if arguments.queries.endswith(".npy"):
        decides, blocks = arguments.threshold, read(Path(arguments.queries)).blocks(BLOCK)
    else:
        model = model_of(arguments)
        found = threshold_of(arguments.checkpoint, model, arguments.threshold)
        decides, blocks = None if found is None else found[0], embedded(arguments.queries, model)
    nearest = gallery.searcher(known, k, arguments.faiss)
    out = arguments.out
    with nullcontext(sys.stdout) if out is None else open_text(out) as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("query", "rank", "name", "identity", "cosine", "same"))
        for block in blocks:
            gallery.check_width(arguments.gallery, known, block.features.shape[1])
            for name, cosines, rows in zip(block.names, *nearest(block.features), strict=True):
                for rank, (cosine, row) in enumerate(zip(cosines, rows, strict=True), start=1):
                    if row >= 0:  # an index of FAISS may find fewer
                        same = "" if decides is None else "yes" if cosine >= decides else "no"
                        who = known.names[row], known.identities[row]
                        writer.writerow((name, rank, *who, f"{cosine:.4f}", same))
    if isinstance(blocks, Embedded):
        blocks.report()


def clean(arguments: Namespace) -> None:
    """Duplicate identities, identities of several people and outliers, by a threshold."""
    if arguments.out is not None:
        check_name(arguments.out, ".csv", ".json")
    path, given = Path(arguments.images), arguments.threshold
    if path.suffix == ".npy" and given is not None:
        cleaning.report(read(path), given, "--threshold", arguments.out)
        return
    model = model_of(arguments)
    found = threshold_of(arguments.checkpoint, model, given)
    if found is None:
        raise UserError("the model has learned no threshold; name one by --threshold")
    with TemporaryDirectory() as folder:
        if path.suffix != ".npy":
            path = Path(folder) / "features.npy"
            write_features(arguments.images, model, path)
        cleaning.report(read(path), *found, arguments.out)


COMMANDS = {
    "embed": (embed, EMBED),
    "compare": (compare, COMPARE),
    "enroll": (enroll, ENROLL),
    "search": (search, SEARCH),
    "clean": (clean, CLEAN),
}


def run(argv: list[str]) -> int:
    parser = subcommands.parser_of(
        COMMANDS,
        COMMON,
        prog="python -m train",
        about=str(__doc__).split(":")[0],
        keys="data.on_error=skip train.device=cpu",
    )
    arguments = subcommands.parse(parser, argv)
    COMMANDS[arguments.command][0](arguments)
    return 0
