"""Train the demo's network once per loss and compare on people never seen in training.

python train/compare_losses.py [--out runs/losses] [--seeds 1] [--only LOSS ...] [--quick]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint import LAST
from train.config.sections import NO_LOSS, class_loss_names, pair_loss_names
from train.data.dataset import open_dataset, open_source
from train.data.orl import CREDIT
from train.errors import DivergedError, Parser, UserError, exit_code
from train.evaluation.embed import embed
from train.evaluation.verification import FARS, FOLDS, Verification, evaluate_features
from train.run_folder import write_json, write_text
from train.tools.demo import ABOUT_TAR, LOSSES_TABLE, columns, describe, train_one
from train.tools.report import Block, Code, Table, layout, mean_and_spread, write_markdown

# Registered names; "a+b" is the sum of a class loss and a pair loss. Without VPL: the steps here
# end before its mixing begins.
ENTRIES = (
    "cosface",
    "arcface",
    "sphereface2",
    "uce",
    "class_bce",
    "npt",
    "epl",
    "unpg",
    "uss",
    "cosface+uss",
    "cosface+pair_bce",
    "cosface+pair_softmax",
)
QUICK = ["model.input_size=16", "train.epochs=1", "train.max_steps=2"]


@dataclass
class Row:
    """Results of the seeds of one entry."""

    results: list[Verification] = field(default_factory=list)
    diverged: dict[int, str] = field(default_factory=dict)  # error by seed


def find_losses(entry: str) -> tuple[str, str] | None:
    """Class loss and pair loss of an entry, or None where it does not name registered ones."""
    classes, pairs = class_loss_names(), pair_loss_names()
    class_name, _, pair_name = entry.partition("+")
    if class_name in pairs and not pair_name:
        return NO_LOSS, class_name
    if class_name in classes and (pair_name in pairs or entry == class_name):
        return class_name, pair_name or NO_LOSS
    return None


def check_entries(names: Sequence[str]) -> list[str]:
    for name in names:
        if find_losses(name) is None:
            raise UserError(
                f"--only: expected a class loss ({', '.join(class_loss_names())}), a pair loss "
                f"({', '.join(pair_loss_names())}) or class+pair, got '{name}'"
            )
    return list(dict.fromkeys(names))


def loss_arguments(entry: str) -> list[str]:
    losses = find_losses(entry)
    assert losses is not None
    return [f"loss.class={losses[0]}", f"loss.pair={losses[1]}"]


def run_one(entry: str, arguments: list[str], folder: Path) -> tuple[Verification, dict[str, Any]]:
    """Train, and score all pairs of the people held out; also the setup for the report."""
    trainer = train_one(entry, [*loss_arguments(entry), *arguments], folder).trainer
    # A hundred megabytes of each of dozens of runs; one is quickly trained again.
    shutil.rmtree(folder / LAST.parent)
    data = open_dataset(trainer.config)
    device = trainer.world.device
    features, labels = embed(trainer.backbone, open_source(trainer.config, data.test), device)
    result = evaluate_features(features, labels, threshold=trainer.loss.threshold(), device=device)
    print(f"{entry}: {result}")
    return result, describe(trainer, data)


def data_arguments(given: Any) -> list[str]:
    """The configuration keys of ``--data``, ``--holdout`` and ``--epochs``."""
    if given.data is not None and given.holdout is None:
        raise UserError("--data needs --holdout: how many of its identities are scored")
    keys = {
        "data.path": None if given.data is None else json.dumps(given.data),
        "data.holdout": given.holdout,
        "train.epochs": given.epochs,
    }
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def run(argv: list[str]) -> int:
    parser = Parser(prog="train/compare_losses.py", description=__doc__)
    parser.add_argument("--out", default="runs/losses", type=Path, help="folder of the report")
    parser.add_argument("--seeds", default=1, type=int, help="runs of each loss: seeds 0, 1, ...")
    parser.add_argument("--only", nargs="+", metavar="LOSS", help="cosface, uss, cosface+uss, ...")
    parser.add_argument("--data", metavar="FOLDER", help="a folder per identity; default: orl")
    parser.add_argument("--holdout", type=int, metavar="N", help="its last N identities are scored")
    parser.add_argument("--epochs", type=int, help="passes over the data; default: the demo's")
    parser.add_argument("--quick", action="store_true", help="smoke run: numbers mean nothing")
    given = parser.parse_args(argv)
    if given.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {given.seeds}")
    entries = check_entries(given.only or ENTRIES)

    rows: dict[str, Row] = {}
    setup: dict[str, Any] = {"smoke": given.quick, "seeds": given.seeds}
    start = time.perf_counter()
    common = ["run.tensorboard=false", "run.save_every=1000000", *data_arguments(given)]
    common += QUICK if given.quick else []
    for entry in entries:
        row = Row()
        for seed in range(given.seeds):
            folder = given.out / f"{entry}-{seed}"
            try:
                result, about = run_one(entry, [*common, f"run.seed={seed}"], folder)
            except DivergedError as error:  # part of the comparison; the other rows go on
                row.diverged[seed] = str(error)
                print(f"{entry}, seed {seed}: {error}", file=sys.stderr)
            else:
                row.results.append(result)
                setup.update(about)
        rows[entry] = row
        setup["seconds"] = round(time.perf_counter() - start)
        if "model" in setup:  # after every row: the next minutes may be cut off
            write_report(given.out, rows, setup)
    if "model" not in setup:
        raise UserError("every run diverged")
    shown = table(rows)
    print(f"\n{layout(shown.header, shown.rows)}\n\nreport: {given.out / 'report.md'}")
    return 0


def table(rows: dict[str, Row]) -> Table:
    """A row per loss: means over the seeds, and the spread where there are several."""
    fars = [f"{far:g}" for far in FARS]
    cells = []
    for entry, row in rows.items():
        results = row.results
        metrics = [
            [r.accuracy for r in results],
            [r.auc for r in results],
            *([r.tar_at_far[far] for r in results] for far in fars),
            [r.accuracy_at_threshold for r in results],
            [r.threshold for r in results],
        ]
        note = f" ({len(row.diverged)} diverged)" if row.diverged else ""
        cells.append([entry + note, *map(mean_and_spread, metrics)])
    return Table(columns("loss", fars, "accuracy at threshold", "learned threshold"), cells)


def caption(setup: dict[str, Any]) -> str:
    smoke = "**Smoke run: the metrics mean nothing.** " if setup["smoke"] else ""
    seeds = setup["seeds"]
    runs = f"mean ± standard deviation over seeds 0 to {seeds - 1}" if seeds > 1 else "seed 0"
    return (
        f"{smoke}{setup['model']}, {setup['epochs']} epochs, {setup['train_identities']} "
        f"identities ({setup['train_images']} images) to train on, all pairs of "
        f"{setup['test_identities']} others ({setup['test_images']} images) scored; {runs}."
    )


def write_report(out: Path, rows: dict[str, Row], setup: dict[str, Any]) -> None:
    """``report.md``, its results in ``report.json``, and its table for the demo's report."""
    results = {entry: [r.to_dict() for r in row.results] for entry, row in rows.items()}
    diverged = {entry: row.diverged for entry, row in rows.items() if row.diverged}
    write_json(out / "report.json", {**setup, "results": results, "diverged": diverged})
    shown = table(rows)
    text = layout(shown.header, shown.rows)
    write_text(out / LOSSES_TABLE, f"{caption(setup)}\n\n{text}\n")
    notes = f"""\
- Every loss trains the same network on the same batches in the same order, with the optimizer and \
the schedule of train/configs/demo.yaml and its own default scale and margin: none is tuned to \
these people. `a+b` is the sum of both losses.
- *accuracy*: balanced (mean of the accuracies on positive and on negative pairs), {FOLDS}-fold \
over pairs: the threshold is the best one of the other folds.
- {ABOUT_TAR}
- *learned threshold*: the cosine at which the loss itself separates same from different, b/s, or \
what SphereFace2's bias comes to; *accuracy at threshold*: balanced accuracy there, with nothing \
fitted on the test people. A dash: the loss has no threshold, or one for each training person.
- With so few people other seeds move the metrics by a few hundredths: compare losses by more.
"""
    notes += "".join(
        f"- {entry}, seed {seed}: {message}\n"
        for entry, row in rows.items()
        for seed, message in row.diverged.items()
    )
    blocks: list[Block] = [
        *(caption(setup), shown, notes),
        "One of them again, seed 0:",
        Code(f"python train/compare_losses.py --only {next(iter(rows))}"),
        f"All runs took {setup['seconds']} s.",
        *([CREDIT] if setup["data"] == "orl" else []),
    ]
    title = "Losses compared on people never seen in training"
    write_markdown(out / "report.md", title, {"": blocks})


def main() -> int:
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
