"""Train on real faces, and compare on people never seen: pixels, PCA, CosFace, CosFace + USS-m.

python train/demo.py [--out runs/demo] [--quick] [--seed 0]
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.config import make_config, parse_overrides, read_yaml
from train.data.dataset import Dataset, open_dataset, open_source
from train.data.orl import CREDIT
from train.distributed import open_world
from train.errors import Parser, exit_code
from train.evaluation import baselines, plots
from train.evaluation.embed import embed
from train.evaluation.roc import roc_curve
from train.evaluation.verification import FARS, FOLDS, Verification, evaluate_features
from train.run_folder import EVALUATION, FEATURES, RunFolder, read_metrics, write_arrays, write_json
from train.tools import run_report
from train.tools.report import (
    Block,
    Code,
    Note,
    Plot,
    Report,
    Sections,
    Table,
    best_of,
    layout,
    mean_and_spread,
    speed_of,
    write,
)
from train.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"

# Name in the report, folder, and what differs between the runs.
RUNS = (
    ("CosFace", "cosface", ["loss.class=cosface", "loss.pair=none"]),
    ("CosFace + USS-m", "unitsface", ["loss.class=cosface", "loss.pair=uss"]),
)
QUICK = ["train.epochs=3"]
SMOKE = Note(
    "**Smoke run.** A few epochs, to see that everything works: the trained models' metrics mean "
    "nothing. Run without `--quick` for real ones."
)
# For every report of verification results.
ABOUT_METRICS = f"""\
- *accuracy*: balanced (mean of the accuracies on positive and on negative pairs; chance is 0.5), \
{FOLDS}-fold over pairs: the threshold is the best one of the other folds.
- *TAR@FAR*: share of positive pairs accepted where at most that share of negative pairs is.
- *learned threshold*: the cosine at which the loss itself separates same from different, b/s, or \
what SphereFace2's bias comes to; *accuracy at threshold*: balanced accuracy there, with nothing \
fitted on the test images. A dash: the loss has no threshold, or one for each training identity.
- *raw pixels*: cosine of gray images minus the mean training image, without any training.
- With so few identities another seed or split moves the metrics by a few hundredths: compare by \
more than that."""


@dataclass
class Trained:
    trainer: Trainer
    folder: Path
    seconds: float
    arguments: list[str]

    def command(self) -> str:
        """The command line of the same run."""
        start = ["python", "train/main.py", "--config", "train/configs/demo.yaml"]
        return shlex.join([*start, *self.arguments, f"run.dir={self.folder.as_posix()}-again"])


def train_one(name: str, arguments: list[str], folder: Path) -> Trained:
    """One run of ``train/main.py`` with these arguments, within this process."""
    config = make_config(
        (str(CONFIG), read_yaml(CONFIG)),
        ("demo", parse_overrides([*arguments, f"run.dir={folder.as_posix()}"])),
    )
    owned = RunFolder(folder, resume=False, overwrite=True, auto=False)
    with owned, open_world(config.train.device) as world:
        owned.check()
        trainer = Trainer(config, world, open_dataset(config).train)
        moved = owned.prepare(config, resume_step=None)
        if moved:
            print(f"what {folder} held was moved to {moved}")
        print(f"\n{name}: {trainer.total_steps} steps on {world.device.type}")
        start = time.perf_counter()
        trainer.fit(folder)
        return Trained(trainer, folder, time.perf_counter() - start, arguments)


def describe(trainer: Trainer, data: Dataset) -> dict[str, Any]:
    """The network and its images, for a report."""
    config, size = trainer.config, trainer.config.model.input_size
    return {
        "model": f"{config.model.name} at {size} x {size}",
        "epochs": config.train.epochs,
        "data": config.data.path,
        "train_identities": len(data.train.images.identities),
        "train_images": len(data.train.images),
        "test_identities": len(data.test.identities),
        "test_images": len(data.test),
    }


def run(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train/demo.py", description=__doc__)
    parser.add_argument("--out", default="runs/demo", type=Path, help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="smoke run: numbers mean nothing")
    parser.add_argument("--seed", default=0, type=int, help="seed of both runs")
    arguments = parser.parse_args(argv)

    common = [f"run.seed={arguments.seed}", *(QUICK if arguments.quick else [])]
    trained = {
        name: train_one(name, [*different, *common], arguments.out / folder)
        for name, folder, different in RUNS
    }
    compare(trained, arguments.out, smoke=arguments.quick)
    return 0


def compare(trained: dict[str, Trained], out: Path, *, smoke: bool) -> None:
    """Score the same pairs with every method; write the report and print its table."""
    trainer = next(iter(trained.values())).trainer
    config = trainer.config
    data = open_dataset(config)
    test = open_source(config, data.test)
    labels = np.asarray(test.images.labels)
    train_gray = baselines.gray_vectors(data.train.stacked().numpy())
    test_gray = baselines.gray_vectors(test.stacked().numpy())

    features = {
        "raw pixels": baselines.raw_pixels(train_gray, test_gray),
        "PCA": baselines.pca(train_gray, test_gray),
    }
    thresholds: dict[str, float | None] = dict.fromkeys(features)
    for name, t in trained.items():
        features[name] = embed(t.trainer.backbone, test, t.trainer.world.device)[0]
        thresholds[name] = t.trainer.loss.threshold()

    results = {
        name: evaluate_features(values, labels, threshold=thresholds[name])
        for name, values in features.items()
    }
    logs = {name: read_metrics(t.folder) for name, t in trained.items()}
    shown: list[Block] = [SMOKE] if smoke else []
    for name, values in features.items():
        given = plots.count_all(values, labels), thresholds[name], results[name].best_threshold
        shown.append(Plot(plots.histogram(name, *given), f"Scores of {name}"))
    curves = {name: roc_curve(values, labels) for name, values in features.items()}
    losses = {
        name: ([line["epoch"] for line in log], [line["loss"] for line in log])
        for name, log in logs.items()
    }
    setup = {"smoke": smoke, **describe(trainer, data), "seed": config.run.seed}
    shown.append(Plot(plots.roc(curves), "ROC"))
    shown.append(Plot(plots.curves("Loss", losses, log=True), "Training loss"))
    ranks = {name: {config.run.seed: result.auc} for name, result in results.items()}
    numbers = best_of(ranks, "AUC", {name: speed_of(log) for name, log in logs.items()})
    rows = {name: [result] for name, result in results.items()}
    found = table("method", rows, "All pairs of people never seen", folds=True)
    comparison = [found, verdict(results, list(trained))]
    title = "Face verification on people never seen in training"
    about = f"{setup['model']}, {setup['epochs']} epochs, seed {setup['seed']}: trained on "
    about += f"{setup['train_identities']} people, compared on {setup['test_identities']} others"
    sections = {"Where they differ": shown, "Results": comparison}
    folded = details(next(iter(results.values())), trained, setup)
    write(out, Report(title, about, numbers, sections, folded))
    written = {
        **setup,
        "training_seconds": {name: round(t.seconds, 1) for name, t in trained.items()},
        "results": {name: result.to_dict() for name, result in results.items()},
        "credit": CREDIT,
    }
    write_json(out / "report.json", written)
    for name, t in trained.items():
        write_json(t.folder / EVALUATION, results[name].to_dict())
        names = np.array(test.images.identities)
        arrays = {"features": features[name], "labels": labels, "identities": names}
        write_arrays(t.folder / FEATURES, **arrays)
        run_report.write(t.folder)
    if smoke:
        print("\nSmoke run: the trained models' metrics mean nothing.")
    print(f"\n{layout(found)}\n\n{comparison[1]}")
    print(f"\nreport: {out / run_report.REPORT}, and as text report.md; each run has its own")


def table(
    first: str, rows: Mapping[str, Sequence[Verification]], about: str = "", *, folds: bool = False
) -> Table:
    """A row per method: means over its results, and the spread of several, or over the folds."""
    fars = [f"{far:g}" for far in FARS]
    cells = []
    for name, results in rows.items():
        accuracy = mean_and_spread([r.accuracy for r in results])
        if folds:
            accuracy += f" ± {results[0].accuracy_std or 0:.3f}"
        rates = [[r.tar_at_far[far] for r in results if far not in r.unresolved()] for far in fars]
        learned = [[r.accuracy_at_threshold for r in results], [r.threshold for r in results]]
        auc = mean_and_spread([r.auc for r in results])
        tar = [mean_and_spread(of_rate) if of_rate else "not resolved" for of_rate in rates]
        cells.append([name, accuracy, auc, *tar, *map(mean_and_spread, learned)])
    named = [f"TAR@FAR={far}" for far in fars]
    header = [first, "accuracy", "AUC", *named, "accuracy at threshold", "learned threshold"]
    return Table(header, cells, about)


def verdict(results: Mapping[str, Verification], trained: list[str]) -> str:
    """Every trained model against the better baseline, in numbers, whatever the outcome."""
    baseline = [r for name, r in results.items() if name not in trained]
    auc, accuracy = max(r.auc for r in baseline), max(r.accuracy for r in baseline)
    lines = []
    for name in trained:
        r = results[name]
        lines.append(
            f"- {name}: AUC {r.auc:.3f} against {auc:.3f} of the better baseline "
            f"({'better' if r.auc > auc else 'NOT better'}), accuracy {r.accuracy:.3f} against "
            f"{accuracy:.3f} ({'better' if r.accuracy > accuracy else 'NOT better'})."
        )
    return "\n".join(lines)


def details(
    result: Verification, trained: Mapping[str, Trained], setup: Mapping[str, Any]
) -> Sections:
    split = f"""\
{setup["train_identities"]} people ({setup["train_images"]} photographs) of the ORL database \
train the models. All {result.pairs} pairs of the last {setup["test_identities"]} people \
({setup["test_images"]} photographs), never seen, are scored: {result.positives} of the same \
person, {result.pairs - result.positives} of different ones."""
    notes = f"""\
{ABOUT_METRICS}
- *accuracy*: ± is the standard deviation over folds.
- *learned threshold*: the training people's images are packed more tightly than those of people \
never seen, so expect less than at a threshold fitted to the latter.
- *PCA*: cosine of eigenface coordinates, fitted on the training people. *CosFace* and *CosFace + \
USS-m*: cosine of {setup["model"]} features, summed over the image and its mirror image."""
    times = ", ".join(f"{name}: {t.seconds:.0f} s" for name, t in trained.items())
    commands = Code("\n".join(t.command() for t in trained.values()))
    return {
        "What was compared": [split, notes, "`make losses` compares more losses on them."],
        "How it was made": [f"Training time: {times}. Each run on its own:", commands, CREDIT],
    }


if __name__ == "__main__":
    sys.exit(exit_code(run))
