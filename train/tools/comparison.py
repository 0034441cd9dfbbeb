"""Train a small network once per loss and compare on identities never seen in training.

python train/compare_losses.py [--out runs/losses] [--seeds 1] [--only LOSS ...] [--quick]
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import unitsface_kernels as uk
from train.checkpoint import LAST
from train.config import make_config, parse_overrides, read_yaml
from train.config.sections import NO_LOSS
from train.data.dataset import open_dataset, open_source
from train.data.named import NAMED
from train.data.sampler import steps_per_epoch
from train.errors import DivergedError, Parser, UserError, exit_code
from train.evaluation import baselines, plots
from train.evaluation.embed import embed
from train.evaluation.verification import Verification, evaluate_features
from train.run_folder import EVALUATION, read_metrics, write_json
from train.tools.demo import ABOUT_METRICS, CONFIG, SMOKE, describe, table, train_one
from train.tools.report import (
    Block,
    Code,
    Note,
    Number,
    Plot,
    Report,
    Table,
    best_of,
    layout,
    speed_of,
    write,
)

# Registered names and variants; "a+b" is the sum of a class loss and a pair loss. Without the
# losses between two towers: an image has no second view here.
ENTRIES = (
    *("cosface", "arcface", "adaface", "magface", "elasticface", "elasticface_cos"),
    *("class_margin", "curricularface", "mv_softmax", "subcenter_arcface", "adacos", "sphereface2"),
    *("uce", "class_bce", "npt", "epl", "unpg", "vpl", "proxy_nca", "proxy_anchor"),
    *("uss", "contrastive", "batch_hard", "multi_similarity", "circle", "simple"),
    *("cosface+uss", "cosface+pair_bce", "cosface+pair_softmax"),
)
# Entries that are another one with other options, as published: its recipe has their source.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "elasticface_cos": ("elasticface", {"kind": "cos", "margin": 0.35, "std": 0.05})
}
RECIPES = CONFIG.parent / "loss"
# Dozens of runs in an hour, and positives in every batch.
SETTING = ["model.name=conv4", "data.images_per_identity=4"]
STEPS = 120  # of a run, in whole epochs
# Options that count epochs or steps before a part of the loss begins: here a tenth of the run.
BEGINNINGS = {"epl": "start_epoch", "vpl": "start_iteration"}
QUICK = ["model.input_size=16", "train.epochs=1", "train.max_steps=2"]
# Columns of the table of several sets, for each.
SUMMARY = ("accuracy", "AUC", "TAR@FAR=0.1")
PIXELS = "raw pixels"
WRITE_EVERY_S = 60.0


@dataclass
class Row:
    """One entry, by seed."""

    results: dict[int, Verification] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)  # error
    speeds: dict[int, float | None] = field(default_factory=dict)  # images/s in training


@dataclass
class ImageSet:
    """A set of images, and the results on it."""

    name: str
    arguments: list[str]
    epochs: int
    steps: int
    rows: dict[str, Row] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # empty until a run has ended


def find_losses(entry: str) -> tuple[str, str] | None:
    """Class loss and pair loss of an entry, or None where it does not name registered ones."""
    entry, _ = VARIANTS.get(entry, (entry, {}))
    class_name, _, pair_name = entry.partition("+")
    if entry in uk.PAIR_LOSSES:
        return NO_LOSS, entry
    if class_name in uk.CLASS_LOSSES and (pair_name in uk.PAIR_LOSSES or entry == class_name):
        return class_name, pair_name or NO_LOSS
    return None


def check_entries(names: Sequence[str]) -> list[str]:
    for name in names:
        if find_losses(name) is None:
            classes, pairs = (", ".join(sorted(r)) for r in (uk.CLASS_LOSSES, uk.PAIR_LOSSES))
            raise UserError(
                f"--only: expected a class loss ({classes}), a pair loss ({pairs}) or class+pair, "
                f"got '{name}'"
            )
    return list(dict.fromkeys(names))


@functools.cache
def _recipes() -> dict[str, dict[str, Any]]:
    return {path.stem: read_yaml(path)["loss"] for path in sorted(RECIPES.glob("*.yaml"))}


def published_options(kind: str, name: str) -> dict[str, Any]:
    """Options of a loss in its recipe, first in that of the same name; none without a recipe."""
    recipes = _recipes()
    for recipe in (recipes.get(name, {}), *recipes.values()):
        if recipe.get(kind) == name:
            return dict(recipe.get(f"{kind}_options", {}))
    return {}


def loss_arguments(entry: str, epochs: int, steps: int) -> list[str]:
    """The losses of an entry in a run of this length, with the options of their recipes."""
    losses = find_losses(entry)
    assert losses is not None
    arguments = []
    for kind, name in zip(("class", "pair"), losses, strict=True):
        options = published_options(kind, name)
        if kind == "class" and entry in VARIANTS:
            options |= VARIANTS[entry][1]
        if name in BEGINNINGS:
            begins = BEGINNINGS[name]
            options[begins] = (epochs if begins.endswith("epoch") else steps) // 10
        arguments += [f"loss.{kind}={name}", f"loss.{kind}_options={json.dumps(options)}"]
    return arguments


def run_one(entry: str, arguments: list[str], folder: Path) -> tuple[Verification, dict[str, Any]]:
    """Train, and score all pairs of those held out; also the setup for the report."""
    trainer = train_one(entry, arguments, folder).trainer
    # Tens of megabytes of each of dozens of runs; one is quickly trained again.
    shutil.rmtree(folder / LAST.parent)
    data = open_dataset(trainer.config)
    device = trainer.world.device
    features, labels = embed(trainer.backbone, open_source(trainer.config, data.test), device)
    result = evaluate_features(features, labels, threshold=trainer.loss.threshold(), device=device)
    about = {**describe(trainer, data), "images_per_s": speed_of(read_metrics(folder))}
    write_json(folder / EVALUATION, {**result.to_dict(), "arguments": arguments, "about": about})
    return result, about


def ended(arguments: list[str], folder: Path) -> tuple[Verification, dict[str, Any]] | None:
    """What :func:`run_one` has returned for these arguments before, if it has."""
    try:
        stored = json.loads((folder / EVALUATION).read_text())
    except FileNotFoundError:
        return None
    if stored.get("arguments") != arguments:
        return None
    return Verification(**{f.name: stored[f.name] for f in fields(Verification)}), stored["about"]


def open_set(name: str, given: Any) -> ImageSet:
    """The configuration keys of ``--data``, ``--holdout`` and ``--epochs``."""
    if name not in NAMED and given.holdout is None:
        raise UserError("--data needs --holdout: how many of its identities are scored")
    arguments = [*SETTING, f"data.path={json.dumps(name)}"]
    if given.holdout is not None:
        arguments.append(f"data.holdout={given.holdout}")
    config = make_config((str(CONFIG), read_yaml(CONFIG)), ("set", parse_overrides(arguments)))
    data = open_dataset(config)
    per_epoch = steps_per_epoch(len(data.train.images), config.train.batch_size)
    epochs = -(-STEPS // per_epoch) if given.epochs is None else given.epochs
    images = ImageSet(name, [*arguments, f"train.epochs={epochs}"], epochs, epochs * per_epoch)
    test = open_source(config, data.test)
    gray = [baselines.gray_vectors(source.stacked().numpy()) for source in (data.train, test)]
    pixels = evaluate_features(baselines.raw_pixels(*gray), test.images.labels)
    images.rows[PIXELS] = Row({0: pixels})
    return images


def run(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train/compare_losses.py", description=__doc__)
    parser.add_argument("--out", default="runs/losses", type=Path, help="folder of the report")
    parser.add_argument("--seeds", default=1, type=int, help="runs of each loss: seeds 0, 1, ...")
    parser.add_argument("--only", nargs="+", metavar="LOSS", help="cosface, uss, cosface+uss, ...")
    parser.add_argument(
        "--data",
        nargs="+",
        default=["orl"],
        metavar="SET",
        help=f"sets of images: {', '.join(NAMED)}, or a folder per identity; default: orl",
    )
    parser.add_argument("--holdout", type=int, metavar="N", help="its last N identities are scored")
    parser.add_argument("--epochs", type=int, help=f"passes over the data; default: {STEPS} steps")
    parser.add_argument("--quick", action="store_true", help="smoke run: numbers mean nothing")
    parser.add_argument("--resume", action="store_true", help="keep the runs in --out that ended")
    given = parser.parse_args(argv)
    if given.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {given.seeds}")
    entries = check_entries(given.only or ENTRIES)
    names = list(dict.fromkeys(given.data))
    if len({Path(name).name for name in names}) < len(names):
        raise UserError(f"--data: expected folders of different names, got {' '.join(names)}")
    sets = [open_set(name, given) for name in names]
    for images in sets:
        images.rows |= {entry: Row() for entry in entries}

    setup: dict[str, Any] = {"smoke": given.quick, "seeds": given.seeds}
    common = ["run.tensorboard=false", "run.save_every=1000000", "run.log_every=30"]
    # Seeds one after another: a comparison that is cut off has every loss.
    runs = [(s, images, e) for s in range(given.seeds) for images in sets for e in entries]
    written = -math.inf
    for number, (seed, images, entry) in enumerate(runs, 1):
        arguments = [*loss_arguments(entry, images.epochs, images.steps), *common]
        arguments += [*images.arguments, *(QUICK if given.quick else []), f"run.seed={seed}"]
        folder = given.out / Path(images.name).name / f"{entry}-{seed}"
        what = f"{images.name}, {entry}, seed {seed}"
        try:
            found = ended(arguments, folder) if given.resume else None
            result, images.about = found or run_one(entry, arguments, folder)
        except DivergedError as error:  # part of the comparison; the other rows go on
            images.rows[entry].diverged[seed] = str(error)
            print(f"{what}: {error}", file=sys.stderr)
        else:
            images.rows[entry].results[seed] = result
            images.rows[entry].speeds[seed] = images.about.pop("images_per_s", None)
            print(f"{what}: {result}")
        done = [s for s in sets if s.about]
        # On the way, too: the rest may be cut off.
        if done and (number == len(runs) or time.monotonic() - written > WRITE_EVERY_S):
            write_report(given.out, done, setup)
            written = time.monotonic()
    if not done:
        raise UserError("every run diverged")
    shown = table_of(done[0]) if len(done) == 1 else summary(done)
    print(f"\n{layout(shown)}\n\nreport: {given.out / 'report.html'}, and as text report.md")
    return 0


def table_of(images: ImageSet, about: str = "") -> Table:
    """A row per loss."""
    rows = {}
    for entry, row in images.rows.items():
        note = f" ({len(row.diverged)} diverged)" if row.diverged else ""
        rows[entry + note] = [*row.results.values()]
    return table("loss", rows, about)


def summary(sets: Sequence[ImageSet]) -> Table:
    """A row per loss with the metrics of :data:`SUMMARY` on every set."""
    tables = [table_of(images) for images in sets]
    header = ["loss", *(f"{images.name}: {metric}" for images in sets for metric in SUMMARY)]
    places = [tables[0].header.index(metric) for metric in SUMMARY]
    rows = [
        [entry, *(cells[place] for cells in parts for place in places)]
        for entry, *parts in zip(sets[0].rows, *(t.rows for t in tables), strict=True)
    ]
    return Table(header, rows, "Every set; more metrics of each below")


def figure_of(images: ImageSet) -> Block:
    """AUCs, as far as losses differ by more than the seeds of a loss do."""
    rows = {
        entry: [result.auc for result in row.results.values()]
        for entry, row in images.rows.items()
        if row.results
    }
    ranked = dict(sorted(rows.items(), key=lambda item: -np.mean(item[1])))
    within = [np.std(values) for values in rows.values() if len(values) > 1]
    if np.std([np.mean(values) for values in rows.values()]) <= np.mean(within or [0]):
        return Note(f"{images.name}: losses differ by no more than seeds do; not drawn.")
    return Plot(
        plots.dots(images.name, "AUC", ranked), f"{images.name}: a dot per seed, a bar for the mean"
    )


def opening(sets: Sequence[ImageSet]) -> list[Number]:
    """The best loss by its mean AUC over the sets, seed by seed."""
    entries = [entry for entry in sets[0].rows if entry != PIXELS]
    scores, speeds = {}, {}
    for entry in entries:
        rows = [images.rows[entry] for images in sets]
        seeds = set.intersection(*(set(row.results) for row in rows))
        if seeds:
            scores[entry] = {s: float(np.mean([row.results[s].auc for row in rows])) for s in seeds}
            known = [speed for row in rows for speed in row.speeds.values() if speed]
            speeds[entry] = float(np.median(known)) if known else None
    return best_of(scores, "AUC", speeds)


def caption(setup: dict[str, Any], about: dict[str, Any]) -> str:
    smoke = "**Smoke run: the metrics mean nothing.** " if setup["smoke"] else ""
    seeds = setup["seeds"]
    runs = f"mean ± standard deviation over seeds 0 to {seeds - 1}" if seeds > 1 else "seed 0"
    return (
        f"{smoke}{about['data']}: {about['model']}, {about['epochs']} epochs, "
        f"{about['train_identities']} identities ({about['train_images']} images) to train on, "
        f"all pairs of {about['test_identities']} others ({about['test_images']} images) scored; "
        f"{runs}."
    )


def write_report(out: Path, sets: Sequence[ImageSet], setup: dict[str, Any]) -> None:
    """``report.html``, the same as text in ``report.md``, and the results in ``report.json``."""
    stored = {
        images.name: {
            **images.about,
            "results": {
                entry: [result.to_dict() for result in row.results.values()]
                for entry, row in images.rows.items()
            },
            "diverged": {e: row.diverged for e, row in images.rows.items() if row.diverged},
            "images_per_s": {e: [*row.speeds.values()] for e, row in images.rows.items()},
        }
        for images in sets
    }
    write_json(out / "report.json", {**setup, "sets": stored})
    captions = {images.name: caption(setup, images.about) for images in sets}
    tables = {images.name: table_of(images, captions[images.name]) for images in sets}
    first = sets[0].name
    notes = f"""\
- Every loss trains the same network on the same batches in the same order, with the optimizer, \
augmentation and schedule of train/configs/demo.yaml; a batch holds up to four images of an \
identity. `a+b` is the sum of both losses.
- Numbers of a loss are those of its recipe in train/configs/loss, as published for large sets, \
or its defaults where it has none. What begins after a number of epochs or steps (EPL's \
prototypes, VPL's mixing) begins after a tenth of the run. Nothing is tuned to these images.
{ABOUT_METRICS}
"""
    notes += "".join(
        f"- {images.name}, {entry}, seed {seed}: {message}\n"
        for images in sets
        for entry, row in images.rows.items()
        for seed, message in row.diverged.items()
    )
    made = [
        notes,
        "One of them again, seed 0:",
        Code(f"python train/compare_losses.py --data {first} --only {list(sets[0].rows)[1]}"),
        *(NAMED[images.name].credit for images in sets if images.name in NAMED),
    ]
    drawn = sorted(map(figure_of, sets), key=lambda block: isinstance(block, Note))
    several = len(sets) > 1
    report = Report(
        "Losses compared on identities never seen in training",
        f"{len(sets[0].rows) - 1} losses, {setup['seeds']} seeds; the numbers are those of "
        f"{'the mean over ' if several else ''}{', '.join(captions)}.",
        opening(sets),
        {"Where they differ": [*([SMOKE] if setup["smoke"] else []), *drawn]},
        {
            **({"All sets": [summary(sets)]} if several else {}),
            **{name: [found] for name, found in tables.items()},
            "How it was made": made,
        },
    )
    write(out, report)


if __name__ == "__main__":
    sys.exit(exit_code(run))
