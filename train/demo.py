"""Train on real faces, and compare on people never seen: pixels, PCA, CosFace, CosFace + USS-m.

python train/demo.py [--out runs/demo] [--quick] [--seed 0]
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: sys.path[0] is train/, the package is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.errors import Parser, exit_code

CONFIG = Path(__file__).resolve().parent / "configs" / "demo.yaml"

# Name in the report, folder, and what differs between the runs.
RUNS = (
    ("CosFace", "cosface", ["loss.class=cosface", "loss.pair=none"]),
    ("CosFace + USS-m", "unitsface", ["loss.class=cosface", "loss.pair=uss"]),
)
QUICK = ["train.epochs=3"]


@dataclass
class Trained:
    trainer: Any
    folder: Path
    seconds: float
    arguments: list[str]


def train_one(name: str, arguments: list[str], folder: Path) -> Trained:
    """One run of ``train/main.py`` with these arguments, within this process."""
    from train.config import make_config, parse_overrides, read_yaml
    from train.data.dataset import open_dataset
    from train.distributed import open_world
    from train.run_folder import RunFolder
    from train.trainer import Trainer

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
    import numpy as np

    from train import html_report, report
    from train.data.dataset import open_dataset, open_source
    from train.evaluation import baselines, plots
    from train.evaluation.embed import embed
    from train.evaluation.roc import roc_curve
    from train.evaluation.verification import all_pairs, evaluate_pairs
    from train.run_folder import EVALUATION, FEATURES, read_metrics, write_arrays, write_json

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

    scores, results = {}, {}
    for name, values in features.items():
        scores[name], same = all_pairs(values, labels)
        results[name] = evaluate_pairs(scores[name], same, threshold=thresholds[name])

    setup = report.Setup(
        smoke=smoke,
        train_identities=len(data.train.images.identities),
        train_images=len(data.train.images),
        test_identities=len(data.test.identities),
        test_images=len(data.test),
        model=f"{config.model.name} at {config.model.input_size} x {config.model.input_size}",
        epochs=config.train.epochs,
        seed=config.run.seed,
        seconds={name: t.seconds for name, t in trained.items()},
        commands={name: command(t) for name, t in trained.items()},
    )
    losses = out.parent / "losses" / report.LOSSES_TABLE
    report.write_report(out, results, list(trained), setup, losses=losses)
    curves = {name: roc_curve(values, labels) for name, values in features.items()}
    plots.save(plots.roc(curves), out / "roc.png")
    lines = {name: (thresholds[name], results[name].best_threshold) for name in scores}
    counts = {name: plots.count(values, same) for name, values in scores.items()}
    plots.save(plots.histograms(counts, lines), out / "histograms.png")
    logs = {name: read_metrics(t.folder) for name, t in trained.items()}
    plots.save(plots.loss_curves(logs), out / "loss.png")
    for name, t in trained.items():
        write_json(t.folder / EVALUATION, results[name].to_dict())
        names = np.array(test.images.identities)
        arrays = {"features": features[name], "labels": labels, "identities": names}
        write_arrays(t.folder / FEATURES, **arrays)
        html_report.write(t.folder)
    if smoke:
        print("\nSmoke run: the trained models' figures mean nothing.")
    print(f"\n{report.table(results)}\n\n{report.verdict(results, list(trained))}")
    print(f"\nreport: {out / 'report.md'}; of each run: {html_report.REPORT} in its folder")


def command(trained: Trained) -> str:
    """The same run by hand."""
    arguments = [*trained.arguments, f"run.dir={trained.folder.as_posix()}-again"]
    return shlex.join(
        ["python", "train/main.py", "--config", "train/configs/demo.yaml", *arguments]
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))
