"""A run as one HTML page: nothing beside it is needed to read it, and nothing is loaded.

python train/html_report.py RUN_FOLDER

Made of the run folder's files alone, so it can be made anew at any time. What a run has not
written, an evaluation or features, is left out and said to be missing.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unitsface_kernels as uk
from train.errors import Parser, UserError, exit_code
from train.evaluation import plots, thresholds
from train.evaluation.rates import without_unresolved
from train.evaluation.roc import roc_curve
from train.evaluation.verification import count_pairs
from train.run_folder import CONFIG, EVALUATION, EVALUATIONS, FEATURES, METRICS
from train.small_files import load_npz, parse_json, read_text
from train.tools.report import Block, Code, Missing, Plot, Table, write_html

REPORT = "report.html"
# Identities whose own threshold is farthest from the unified one.
LISTED_IDENTITIES = 10
ONLY_PAIRS = (
    "ROC, histograms and thresholds per identity are of identities held out of training "
    "(data.holdout). This run has none; train/evaluate.py verification --out draws the pairs of "
    "its sets."
)
SCORES = ("ROC", "Scores", "A threshold per identity")

Blocks = list[Block]


# -- contents of a run folder -----------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; none where there is no file."""
    if not path.exists():
        return []
    found = []
    # Text after the last end of a line is being written, or was when the process died.
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        value = parse_json(line, f"{path}, line {number}")
        if not isinstance(value, dict) or "epoch" not in value:
            raise UserError(f"{path}, line {number}: expected an object with an epoch")
        found.append(value)
    return found


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    values = parse_json(read_text(path), path)
    if not isinstance(values, dict) or "accuracy" not in values:
        raise UserError(f"{path}: expected the figures of an evaluation")
    return values


def _features(path: Path) -> tuple[Any, Any, list[str]] | None:
    """(N, D) features, (N,) labels and the names of the identities."""
    if not path.exists():
        return None
    features, labels, identities = load_npz(path, "features", "labels", "identities")
    names = [str(name) for name in identities.ravel()]
    fits = features.ndim == 2 and labels.shape == features.shape[:1]
    if not fits or features.dtype.kind != "f" or labels.dtype.kind not in "iu":
        given = f"{features.shape} of {features.dtype} and {labels.shape} of {labels.dtype}"
        raise UserError(f"{path}: expected features (N, D) and labels (N,), got {given}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"{path}: labels beyond its {len(names)} identities")
    return features, labels, names


# -- sections -------------------------------------------------------------------------------


def _spaced(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [(prefix + name.replace("_", " "), value) for name, value in metrics.items()]


def _results(evaluation: dict[str, Any] | None, evaluations: list[dict[str, Any]]) -> Blocks:
    """Metrics of the final evaluation, and of every set when last evaluated."""
    blocks: Blocks = []
    if evaluation is not None:
        flat: dict[str, Any] = {}
        for key, value in evaluation.items():
            if isinstance(value, dict):
                flat |= {f"{key.replace('tar_at_far', 'tar')}@far={k}": v for k, v in value.items()}
            else:
                flat[key] = value
        if "pairs" in evaluation and "positives" in evaluation:
            flat = without_unresolved(flat, evaluation["pairs"] - evaluation["positives"])
        blocks += ["Identities held out, all pairs:", Table(["metric", "value"], _spaced(flat))]
    last: dict[str, dict[str, Any]] = {}
    for line in evaluations:
        for name, metrics in line["eval"].items():
            last[name] = {"step": line.get("step"), **metrics}
    if last:
        keys = list(dict.fromkeys(key for metrics in last.values() for key in metrics))
        rows = [(name, *(metrics.get(key) for key in keys)) for name, metrics in last.items()]
        header = ["set", *(key.replace("_", " ") for key in keys)]
        blocks += ["Every set, when last evaluated:", Table(header, rows)]
    return blocks or [Missing("This run has not been evaluated.")]


def _training(lines: list[dict[str, Any]], evaluations: list[dict[str, Any]], name: str) -> Blocks:
    if not lines:
        return [Missing("This run has not logged a step.")]
    # Epochs and values by metric and set.
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in evaluations:
        for test, metrics in line["eval"].items():
            for key, value in metrics.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    epochs, values = curves.setdefault(key, {}).setdefault(test, ([], []))
                    epochs.append(line["epoch"])
                    values.append(value)
    best = curves.pop("best_threshold", {})
    blocks: Blocks = [
        Plot(plots.loss_curves({name: lines}, best), "Loss, and the learned threshold b / s"),
        Plot(plots.speed(lines), "Learning rate and images per second"),
    ]
    if curves:
        blocks.append(Plot(plots.evaluations(curves), "Metrics of the test sets during training"))
    return blocks


def _scores(
    found: tuple[Any, Any, list[str]] | None, learned: float | None
) -> dict[str, list[Block]]:
    """ROC, histograms and thresholds of the identities held out."""
    if found is None:
        return {title: [Missing(f"This run has no {FEATURES}.")] for title in SCORES}
    features, labels, names = found
    pairs, positives = count_pairs(labels)
    if positives in (0, pairs):
        reason = Missing("Its images form no positive or no negative pair.")
        return {title: [reason] for title in SCORES}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curve = roc_curve(features, labels, device)
    rates = [(f"{p.far:g}", p.tar, p.threshold, p.achieved_far) for p in curve.at]
    roc: Blocks = [
        Plot(plots.roc({"held out": curve}), f"ROC of all {pairs} pairs"),
        Table(["FAR", "TAR", "threshold", "achieved FAR"], rates),
    ]
    if curve.unresolved:
        unresolved = ", ".join(f"{far:g}" for far in curve.unresolved)
        roc.append(Missing(f"Too few negative pairs for FAR {unresolved}."))
    unified = thresholds.unify(features, labels, learned, device)
    counts = {"held out": plots.count_all(features, labels, device)}
    histograms: Blocks = [
        Plot(
            plots.histograms(counts, {"held out": (learned, unified.best)}),
            "Cosines of positive and of negative pairs, each to its own area",
        ),
        Table(
            ["threshold", "cosine", "balanced accuracy"],
            [
                ("best for these pairs", unified.best, unified.accuracy_at_best),
                ("learned b / s", learned, unified.accuracy_at_learned),
                ("learned - best", unified.gap, None),
            ],
        ),
    ]
    spread = thresholds.per_identity(features, labels, device)
    center = unified.best if learned is None else learned
    far_off = np.argsort(-np.abs(spread.thresholds - center), kind="stable")[:LISTED_IDENTITIES]
    columns = (
        *(spread.thresholds, spread.accuracies),
        *(spread.highest_negative, spread.lowest_positive),
    )
    rows = [
        (names[spread.identities[i]], *(float(column[i]) for column in columns)) for i in far_off
    ]
    metrics = _spaced(spread.to_dict(unified))
    many = thresholds.identify(features, labels, learned, device)
    if many is not None:
        metrics += _spaced(many.to_dict(), "1:N ")
    caption = "The best threshold of each identity beside the unified one"
    header = ["identity", "threshold", "accuracy", "highest negative", "lowest positive"]
    identities: Blocks = [
        Plot(plots.identity_thresholds(spread, learned, unified.best), caption),
        Table(["metric", "value"], metrics),
        "Farthest from the unified threshold:",
        Table(header, rows),
    ]
    return dict(zip(SCORES, (roc, histograms, identities), strict=True))


def _versions() -> Blocks:
    rows = [
        ("unitsface_kernels", uk.__version__),
        ("Torch", torch.__version__),
        ("NumPy", np.__version__),
        ("Python", platform.python_version()),
    ]
    return ["Packages that wrote this page:", Table(["package", "version"], rows)]


def write(run_folder: Path) -> Path:
    """``report.html`` of a run folder, out of the files in it."""
    folder = Path(run_folder)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is no run folder: it has no {METRICS}")
    lines, evaluations = _lines(folder / METRICS), _lines(folder / EVALUATIONS)
    evaluations = [line for line in evaluations if isinstance(line.get("eval"), dict)]
    evaluation, features = _evaluation(folder / EVALUATION), _features(folder / FEATURES)
    learned = evaluation.get("threshold") if evaluation else None
    if evaluation is None and lines:
        learned = lines[-1].get("threshold")
    name, config = folder.resolve().name, folder / CONFIG
    scores = _scores(features, learned)
    sets = {name for line in evaluations for name in line["eval"]}
    only_pairs = features is None and evaluation is None and bool(sets) and "held_out" not in sets
    configuration: Block = Missing(f"This run has no {CONFIG}.")
    if config.is_file():
        configuration = Code(config.read_text(encoding="utf-8"))
    sections = {
        "Results": [*_results(evaluation, evaluations), *([ONLY_PAIRS] if only_pairs else [])],
        "Training": _training(lines, evaluations, name),
        **({} if only_pairs else scores),
        "Configuration": [configuration],
        "Versions": _versions(),
    }
    try:
        write_html(folder / REPORT, name, sections)
    except OSError as error:
        raise UserError(f"cannot write {folder / REPORT}: {error.strerror}") from error
    return folder / REPORT


def run(argv: list[str]) -> int:
    parser = Parser(prog="train/html_report.py", description="A run as one HTML page.")
    parser.add_argument("run_folder", type=Path, help="run.dir of a run, finished or not")
    print(f"report: {write(parser.parse_args(argv).run_folder)}")
    return 0


def main() -> int:
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
