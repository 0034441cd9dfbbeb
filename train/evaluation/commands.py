"""Commands over folders of images and verification sets."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from train.data.dataset import open_source, scan
from train.data.image_list import ImageList
from train.errors import UserError, reported
from train.evaluation import plots
from train.evaluation.model import Model, load_model
from train.evaluation.rates import resolved
from train.evaluation.roc import roc_curve
from train.evaluation.test_sets import FAR, BinSet, open_bin_set, open_bin_sets
from train.evaluation.thresholds import identify, per_identity, unify
from train.evaluation.verification import count_pairs, evaluate_features
from train.run_folder import write_json
from train.tools.report import Table, layout

LAST: dict[str, Any] = {
    "type": int,
    "default": 0,
    "metavar": "N",
    "help": "only the last N identities, those that data.holdout=N keeps out of training; 0: all",
}
PAIRS: dict[str, dict[str, Any]] = {
    "data": {"help": "folder with one sub-folder of images per identity, or 'orl'"},
    "--last": LAST,
    "--roc": {
        "action": "store_true",
        "help": "also TAR at FAR from 1e-6 to 0.1, and roc.csv and roc.png in --out",
    },
}
THRESHOLDS: dict[str, dict[str, Any]] = {
    "--data": {
        "nargs": "+",
        "default": ["orl"],
        "metavar": "SET",
        "help": "folders with one sub-folder of images per identity, 'orl', or verification sets "
        "(.bin files), whose pairs have no identities: only the unified threshold applies there",
    },
    "--last": LAST,
}
VERIFICATION: dict[str, dict[str, Any]] = {
    "sets": {"nargs": "+", "metavar": "SET", "help": "e.g. lfw.bin cfp_fp.bin"}
}


class Output:
    """The folder of ``--out``; without one nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            with reported(f"--out: cannot make the folder {folder}"):
                folder.mkdir(parents=True, exist_ok=True)

    def json(self, name: str, values: Any) -> None:
        if self.folder is not None:
            write_json(self.folder / name, values)

    def plot(self, name: str, figure: Figure) -> None:
        if self.folder is not None:
            plots.save(figure, self.folder / name)

    def csv(self, name: str, columns: dict[str, Iterable[Any]]) -> None:
        if self.folder is not None:
            # Names of folders may be no text.
            options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
            with open(self.folder / name, "w", newline="", **options) as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))


def load(arguments: Namespace) -> Model:
    return load_model(arguments.checkpoint, arguments.overrides, arguments.batch_size)


def open_folder(path: str, last: int, model: Model) -> ImageList:
    """The images of a folder, of its last identities only where ``last`` is not 0."""
    images = scan(path, skip=model.config.data.on_error == "skip")
    count = len(images.identities)
    if not 0 <= last <= count:
        raise UserError(f"--last: expected 0 to {count}, the identities of {path}, got {last}")
    kept = images.keep(np.flatnonzero(images.labels >= count - last)) if last else images
    check_pairs(kept.labels, path)
    return replace(kept, left_out=images.left_out)


def embed_folder(
    images: ImageList, path: str, model: Model
) -> tuple[NDArray[np.float32], NDArray[np.int64], Sequence[str]]:
    """Features, labels and names of identities; prints which images cannot be read."""
    source = open_source(model.config, images)
    features, labels = model.embed(source)
    read = source.readable()
    check_pairs(labels[read], path)
    skipped = {**images.left_out, **source.skipped}
    if skipped:
        print(f"{path}: {len(skipped)} images skipped, such as {next(iter(skipped.values()))}")
    return features[read], labels[read], source.images.identities


def check_pairs(labels: NDArray[np.int64], path: str) -> None:
    pairs, positives = count_pairs(labels)
    if positives in (0, pairs):
        kind = "positive" if positives == 0 else "negative"
        raise UserError(f"{path}: its images form no {kind} pair")


def pairs(arguments: Namespace) -> None:
    """All pairs of a folder of images: accuracy, AUC, TAR at FAR, ROC."""
    if arguments.roc and arguments.out is None:
        raise UserError("--roc writes files: name a folder with --out")
    model = load(arguments)
    path = arguments.data
    images = open_folder(path, arguments.last, model)
    out = Output(arguments.out)
    features, labels, identities = embed_folder(images, path, model)
    result = evaluate_features(features, labels, threshold=model.threshold, device=model.device)
    print(f"{len(identities)} identities, {result.pairs} pairs: {result}")
    if out.folder is None:
        return
    metrics = result.to_dict()
    counts = plots.count_all(features, labels, model.device)
    figure = plots.histogram(path, counts, model.threshold, result.best_threshold)
    out.plot("scores.png", figure)
    if arguments.roc:
        curve = roc_curve(features, labels, model.device)
        print(curve)
        metrics["roc"] = curve.to_dict()
        columns = {"threshold": curve.thresholds, "far": curve.far, "tar": curve.tar}
        out.csv("roc.csv", {name: values.tolist() for name, values in columns.items()})
        out.plot("roc.png", plots.roc({path: curve}, "All pairs"))
    out.json("pairs.json", metrics)


def verification(arguments: Namespace) -> None:
    """Verification sets such as lfw.bin: 10-fold accuracy with flip test."""
    model = load(arguments)
    sets = open_bin_sets(arguments.sets, model.config)
    out = Output(arguments.out)
    metrics = {}
    print(f"{'set':<16}{'accuracy':>18}{'AUC':>9}{'val@FAR=1e-3':>14}{'at b/s':>9}{'best':>8}")
    for test_set in sets:
        row = metrics[test_set.name] = score_pairs(test_set, model, out, test_set.name)
        negatives = int((~test_set.same).sum())
        validation = f"{row['val@far=0.001']:.4f}" if resolved(FAR, negatives) else "not resolved"
        learned = row.get("accuracy_at_threshold")
        print(
            f"{test_set.name:<16}{row['accuracy']:>9.4f} ± {row['accuracy_std']:.4f}"
            f"{row['auc']:>9.4f}{validation:>14}"
            f"{'-' if learned is None else f'{learned:.4f}':>9}{row['best_threshold']:>8.3f}"
            + (f"  ({row['skipped_pairs']} pairs skipped)" if "skipped_pairs" in row else "")
        )
    out.json("verification.json", metrics)


def score_pairs(test_set: BinSet, model: Model, out: Output, name: str) -> dict[str, float]:
    """Its metrics, and ``<name>-scores.png``: cosines, the learned and the best threshold."""
    features, _ = model.embed(test_set.source)
    row = test_set.score(features, threshold=model.threshold, device=model.device)
    if out.folder is not None:
        counts = plots.count(*test_set.pair_scores(features))
        figure = plots.histogram(name, counts, model.threshold, row["best_threshold"])
        out.plot(f"{name}-scores.png", figure)
    return row


def thresholds(arguments: Namespace) -> None:
    """The learned threshold against the best ones: of each set, of each identity.

    One threshold for all: the learned one beside the best one of each set and the best one of each
    identity (UniTSFace's figure 1), and accuracies of one against many at a single threshold.
    """
    model = load(arguments)
    # All are opened before the first is evaluated: a mistake in the last costs no waiting.
    sets = [
        open_bin_set(path, model.config)
        if path.endswith(".bin")
        else open_folder(path, arguments.last, model)
        for path in arguments.data
    ]
    out = Output(arguments.out)
    reports: dict[str, dict[str, Any]] = {}
    names = unique_names(arguments.data)
    for name, path, opened in zip(names, arguments.data, sets, strict=True):
        if isinstance(opened, BinSet):
            reports[name] = _thresholds_of_pairs(opened, model, out, name)
        else:
            reports[name] = _thresholds_of_folder(opened, path, model, out, name)
    print(table(reports))
    if model.threshold is None:
        print("this model's losses learn no unified threshold")
    out.json("thresholds.json", reports)


def _thresholds_of_pairs(test_set: BinSet, model: Model, out: Output, name: str) -> dict[str, Any]:
    """The accuracy is that of the set's own protocol, at thresholds fitted to other pairs."""
    row = score_pairs(test_set, model, out, name)
    best, learned = row["best_threshold"], model.threshold
    unified = {
        "pairs": row.get("pairs"),
        "best": best,
        "accuracy": row["accuracy"],
        "learned": learned,
        "accuracy_at_learned": row.get("accuracy_at_threshold"),
        "gap": None if learned is None else learned - best,
    }
    return {"unified": unified, "per_identity": None, "identification": None}


def _thresholds_of_folder(
    images: ImageList, path: str, model: Model, out: Output, name: str
) -> dict[str, Any]:
    """All pairs, each identity, and one against many; with files in ``--out``."""
    features, labels, identities = embed_folder(images, path, model)
    given = (features, labels, model.threshold, model.device)
    unified, many = unify(*given), identify(*given)
    spread = per_identity(features, labels, model.device)
    if out.folder is not None:
        figure = plots.identity_thresholds(spread, unified.learned, unified.best)
        out.plot(f"{name}.png", figure)
        out.csv(f"{name}.csv", spread.columns(identities))
    return {
        "unified": unified.to_dict(),
        "per_identity": spread.to_dict(unified),
        "identification": None if many is None else asdict(many),
    }


def unique_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, numbered where it is not the first of its name."""
    names: list[str] = []
    for path in paths:
        stem = Path(path).resolve().name
        count = 1
        while (name := stem if count == 1 else f"{stem}-{count}") in names:
            count += 1
        names.append(name)
    return names


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A row per set; a dash where there is no value."""
    header = ["set", "pairs", "best", "accuracy", "learned b/s", "accuracy", "gap"]
    header += ["per identity: mean ± std", "1:N", "1:N uniform", "at b/s"]

    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for name, report in reports.items():
        unified, spread, many = (
            report[key] or {} for key in ("unified", "per_identity", "identification")
        )
        accuracy = unified.get("accuracy_at_best", unified.get("accuracy"))
        row = [name, show(unified["pairs"], "d"), show(unified["best"]), show(accuracy)]
        row += [show(unified["learned"]), show(unified["accuracy_at_learned"])]
        row.append(show(unified["gap"], "+.3f"))
        mean, std = (spread.get(key) for key in ("mean_threshold", "std_of_thresholds"))
        row.append("-" if mean is None else f"{mean:.3f} ± {std:.3f}")
        row += [show(many.get(k)) for k in ("sample_wise", "uniform", "uniform_at_learned")]
        rows.append(row)
    return layout(Table(header, rows))
