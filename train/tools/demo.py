"""Train on real faces, and compare on people never seen: pixels, PCA, CosFace, CosFace + USS-m.

python train/demo.py [--out runs/demo] [--quick] [--seed 0]
"""

from __future__ import annotations

import os
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
from train.evaluation.verification import FOLDS, Verification, all_pairs, evaluate_pairs
from train.run_folder import (
    EVALUATION,
    FEATURES,
    RunFolder,
    read_metrics,
    write_arrays,
    write_json,
)
from train.tools import run_report
from train.tools.report import Code, Plot, Sections, Table, layout, mean_and_spread, write_markdown
from train.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"

# Name in the report, folder, and what differs between the runs.
RUNS = (
    ("CosFace", "cosface", ["loss.class=cosface", "loss.pair=none"]),
    ("CosFace + USS-m", "unitsface", ["loss.class=cosface", "loss.pair=uss"]),
)
QUICK = ["train.epochs=3"]
# The table of a comparison of losses, with a caption, for this report.
LOSSES_TABLE = "table.md"
ABOUT_TAR = (
    "*TAR@FAR*: share of positive pairs accepted where at most that share of negative pairs is."
)


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


def run(argv: list[str]) -> int:
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

    counts, results = {}, {}
    for name, values in features.items():
        scores, same = all_pairs(values, labels)
        counts[name] = plots.count(scores, same)
        results[name] = evaluate_pairs(scores, same, threshold=thresholds[name])

    setup = {"smoke": smoke, **describe(trainer, data), "seed": config.run.seed}
    lines = {name: (thresholds[name], result.best_threshold) for name, result in results.items()}
    logs = {name: read_metrics(t.folder) for name, t in trained.items()}
    curves = {name: roc_curve(values, labels) for name, values in features.items()}
    drawings = [
        Plot(plots.roc(curves), "ROC", "roc.png"),
        Plot(
            plots.histograms(counts, lines),
            "Scores of positive and negative pairs",
            "histograms.png",
        ),
        Plot(plots.loss_curves(logs), "Loss and learned threshold", "loss.png"),
    ]
    losses = other_losses(out.parent / "losses" / LOSSES_TABLE, out)
    parts = sections(results, trained, setup, drawings, losses)
    write_markdown(out / "report.md", "Face verification on people never seen in training", parts)
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
    shown = table(results)
    print(f"\n{layout(shown.header, shown.rows)}\n\n{verdict(results, list(trained))}")
    print(f"\nreport: {out / 'report.md'}; of each run: {run_report.REPORT} in its folder")


def columns(first: str, fars: Sequence[str], at_threshold: str, threshold: str) -> list[str]:
    """The header of a table of verification results."""
    rates = [f"TAR@FAR={far}" for far in fars]
    return [first, "accuracy", "AUC", *rates, at_threshold, threshold]


def table(results: Mapping[str, Verification]) -> Table:
    """A row per method."""
    rows = []
    for name, r in results.items():
        accuracy = mean_and_spread([r.accuracy])
        if r.accuracy_std is not None:
            accuracy += f" ± {r.accuracy_std:.3f}"
        learned = [r.accuracy_at_threshold, r.threshold]
        metrics = [accuracy, mean_and_spread([r.auc]), *r.rates().values()]
        rows.append([name, *metrics, *(mean_and_spread([value]) for value in learned)])
    fars = list(next(iter(results.values())).tar_at_far)
    return Table(columns("method", fars, "accuracy at b/s", "b/s"), rows)


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


def other_losses(path: Path, folder: Path) -> str:
    """The section with the comparison of losses, as far as one has been made, for ``folder``."""
    if not path.is_file():
        return "`make losses` compares more losses on the same people."
    link = Path(os.path.relpath(path.parent / "report.md", folder)).as_posix()
    return f"{path.read_text().strip()}\n\n[How it was made]({link})."


def sections(
    results: Mapping[str, Verification],
    trained: Mapping[str, Trained],
    setup: Mapping[str, Any],
    drawings: Sequence[Plot],
    losses: str,
) -> Sections:
    result = next(iter(results.values()))
    smoke = (
        "> **Smoke run.** A few epochs, to see that everything works: the trained models' "
        "metrics mean nothing. Run without `--quick` for real ones."
    )
    split = f"""\
{setup["train_identities"]} people ({setup["train_images"]} photographs) of the ORL database \
train the models; the other {setup["test_identities"]} people ({setup["test_images"]} \
photographs) are never seen. All {result.pairs} pairs of the latter are scored: \
{result.positives} of the same person, {result.pairs - result.positives} of different ones. The \
split is fixed: people are ordered s1, s2, ..., s40 and the last {setup["test_identities"]} are \
the test."""
    notes = f"""\
- *accuracy*: balanced (mean of the accuracies on positive and on negative pairs; chance is 0.5), \
{FOLDS}-fold over pairs: the threshold is the best one of the other folds. Mean ± standard \
deviation over folds.
- {ABOUT_TAR}
- *accuracy at b/s*: balanced accuracy at the threshold that USS learned on the training people, \
with nothing fitted on the test people. The training people's images are packed more tightly \
than those of people never seen, so expect less than at a threshold fitted to the latter.
- *raw pixels*: cosine of gray images minus the mean training image. *PCA*: cosine of \
eigenface coordinates, fitted on the training people. *CosFace* and *CosFace + USS-m*: cosine of \
{setup["model"]} features, summed over the image and its mirror image.
- With this few people a different seed or split moves the metrics by a few hundredths: compare \
methods by more than that."""
    times = ", ".join(f"{name}: {t.seconds:.0f} s" for name, t in trained.items())
    made = (
        f"{setup['model']}, {setup['epochs']} epochs, seed {setup['seed']}. "
        f"Training time: {times}.\nEach run on its own:"
    )
    commands = Code("\n".join(t.command() for t in trained.values()))
    comparison = [table(results), verdict(results, list(trained)), notes, *drawings]
    return {
        "": [*([smoke] if setup["smoke"] else []), split, *comparison],
        "Other losses": [losses],
        "How it was made": [made, commands, CREDIT],
    }


def main() -> int:
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
