"""A run as one HTML page: nothing beside it is needed to read it, and nothing is loaded.

python train/html_report.py RUN_FOLDER

Made of the run folder's files alone, so it can be made anew at any time. What a run has not
written, an evaluation or features, is left out and said to be missing.
"""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unitsface_kernels as uk
from train.config import read_yaml
from train.errors import Parser, UserError, exit_code, reported
from train.evaluation import plots, thresholds
from train.evaluation.rates import without_unresolved
from train.evaluation.roc import Roc, roc_curve
from train.evaluation.verification import count_pairs
from train.run_folder import CONFIG, EVALUATION, EVALUATIONS, FEATURES, METRICS
from train.small_files import load_npz, parse_json, read_text
from train.tools.report import (
    Block,
    Code,
    Note,
    Number,
    Plot,
    Report,
    Table,
    cell,
    is_number,
    speed_of,
    whole,
    write_html,
)

REPORT = "report.html"
# A rate of fewer negative pairs than these is that of a few images.
FEWEST_ACCEPTED = 10
TITLES = {
    "threshold": "Learned threshold b / s",
    "lr": "Learning rate",
    "images_per_s": "Images/s",
    "parts": "Milliseconds of the parts of a step",
}
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
        if not isinstance(value, dict) or not is_number(value.get("epoch")):
            raise UserError(f"{path}, line {number}: expected an object with an epoch")
        found.append(value)
    return found


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    values = parse_json(read_text(path), path)
    try:
        rates = values.get("tar_at_far", {})
        figures = [values["accuracy"], *map(float, rates), *rates.values()]
        figures += [values[k] for k in ("pairs", "positives", "threshold") if values.get(k)]
    except (AttributeError, KeyError, TypeError, ValueError):
        figures = [None]
    if not all(map(is_number, figures)):
        raise UserError(f"{path}: expected the figures of an evaluation")
    return values


def _is_of_sets(value: Any) -> bool:
    """Whether a line of evaluations has metrics by set and name."""
    return isinstance(value, dict) and all(isinstance(found, dict) for found in value.values())


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


def _milliseconds(line: dict[str, Any]) -> dict[str, float]:
    """The parts of a step by name."""
    parts = {key.removesuffix("_ms"): v for key, v in line.items() if key.endswith("_ms")}
    return {name: value for name, value in parts.items() if is_number(value)}


def _numbers(
    lines: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    last: dict[str, dict[str, Any]],
    curve: Roc | None,
) -> list[Number]:
    """The three at the top: of identities held out, else of test sets, else of the loss."""
    why = "training of all processes, median over the log: data, loss and update included"
    times = [_milliseconds(line) for line in lines]
    if total := sum(sum(of_step.values()) for of_step in times):
        waited = sum(of_step.get("data", 0.0) for of_step in times)
        why += f"; {100 * waited / total:.0f} % of a step is waiting for data"
    speed = (whole(speed_of(lines)), "images/s", why)
    accuracies = {n: m["accuracy"] for n, m in last.items() if is_number(m.get("accuracy"))}
    order = "a positive pair has the higher cosine with this probability"
    if evaluation is not None:
        negatives = evaluation.get("pairs", 0) - evaluation.get("positives", 0)
        rates = {float(far): tar for far, tar in evaluation.get("tar_at_far", {}).items()}
        rates |= {point.far: point.tar for point in curve.at} if curve else {}
        far = min((f for f in rates if f * negatives >= FEWEST_ACCEPTED), default=None)
        why = "balanced: the mean of those on positive and on negative pairs of identities held out"
        first = (f"{100 * evaluation['accuracy']:.1f} %", "verification accuracy", why)
        if far is not None:
            why = (
                f"of identities held out; the lowest usual rate that {FEWEST_ACCEPTED} or more of "
                f"the {negatives} negative pairs decide"
            )
            first = (f"{100 * rates[far]:.1f} %", f"TAR at FAR {far:g}", why)
        if curve is None:
            return [first, (cell(evaluation.get("auc")), "AUC", order), speed]
        equal = int(np.argmin(np.abs(curve.far - (1 - curve.tar))))
        error = f"{50 * (curve.far[equal] + 1 - curve.tar[equal]):.1f} %"
        why = "errors of both kinds at the threshold where they are equal: nothing is chosen"
        return [first, (error, "equal error rate", why), speed]
    if accuracies:
        mean, worst = np.mean([*accuracies.values()]), min(accuracies, key=accuracies.__getitem__)
        why = f"by the protocol of the test sets, mean of {len(accuracies)}, when last evaluated"
        first = (f"{100 * mean:.2f} %", "verification accuracy", why)
        if len(accuracies) == 1:
            return [first, (cell(last[worst].get("auc")), "AUC", order), speed]
        why = "accuracy on the hardest of the sets, where models differ most"
        return [first, (f"{100 * accuracies[worst]:.2f} %", worst, why), speed]
    line = lines[-1] if lines else {}
    why = "the latest in the log: nothing has been evaluated" if lines else "no step was logged"
    learned = "the cosine b / s above which two images are taken for one person"
    threshold = (cell(line.get("threshold")), "learned threshold", learned)
    return [(cell(line.get("loss")), "training loss", why), threshold, speed]


def _results(evaluation: dict[str, Any] | None) -> Blocks:
    """Every metric of the final evaluation."""
    if evaluation is None:
        return [Note("This run has not been evaluated on identities held out.")]
    flat: dict[str, Any] = {}
    for key, value in evaluation.items():
        if isinstance(value, dict):
            flat |= {f"{key.replace('tar_at_far', 'tar')}@far={k}": v for k, v in value.items()}
        else:
            flat[key] = value
    if "pairs" in evaluation and "positives" in evaluation:
        flat = without_unresolved(flat, evaluation["pairs"] - evaluation["positives"])
    return [Table(["metric", "value"], _spaced(flat), "Identities held out, all pairs")]


def _sets(last: dict[str, dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for metrics in last.values() for key in metrics))
    rows = [(name, *(metrics.get(key) for key in keys)) for name, metrics in last.items()]
    header = ["set", *(key.replace("_", " ") for key in keys)]
    return Table(header, rows, "Every set, when last evaluated")


def _training(lines: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Blocks:
    """A panel for each value that changes in the course of the run or between sets."""
    if not lines:
        return [Note("This run has not logged a step.")]
    panels: dict[str, dict[str, tuple[list[float], list[Any]]]] = {}

    def add(panel: str, label: str, epoch: float, value: Any) -> None:
        if is_number(value):
            epochs, values = panels.setdefault(panel, {}).setdefault(label, ([], []))
            epochs.append(epoch)
            values.append(value)

    terms = dict.fromkeys(("class_loss", "pair_loss"), "loss")
    if not all(any(line.get(term) is not None for line in lines) for term in terms):
        terms = {}  # one alone is the loss
    for line in lines:
        for key in ("loss", *terms, "threshold", "lr", "images_per_s"):
            add(terms.get(key, key), key.replace("_", " "), line["epoch"], line.get(key))
        for part, value in _milliseconds(line).items():
            add("parts", part, line["epoch"], value)
    for line in evaluations:
        for name, metrics in line["eval"].items():
            for key, value in metrics.items():
                if key == "best_threshold":  # to be compared with the learned one
                    add("threshold", f"best on {name}", line["epoch"], value)
                elif key != "threshold":
                    add(key, name, line["epoch"], value)
    blocks: Blocks = []
    constant = []
    for key, found in panels.items():
        values = {value for _, of_line in found.values() for value in of_line}
        title = TITLES.get(key, key.replace("_", " ").capitalize())
        title = title.upper() if key.startswith(("auc", "tar@far")) else title
        if len(values) > 1:
            blocks.append(Plot(plots.curves(title, found, log=key == "loss"), title))
        else:
            constant.append(f"{title} {cell(*values)}")
    return [*blocks, *([Note(f"Constant: {', '.join(constant)}.")] if constant else [])]


def _scores(
    found: tuple[Any, Any, list[str]] | None, learned: float | None
) -> tuple[Roc | None, Blocks, dict[str, Blocks]]:
    """The ROC of the identities held out, figures, and tables by section."""
    if found is None:
        return None, [], {title: [Note(f"This run has no {FEATURES}.")] for title in SCORES}
    features, labels, names = found
    pairs, positives = count_pairs(labels)
    if positives in (0, pairs):
        reason = Note("Its images form no positive or no negative pair.")
        return None, [], {title: [reason] for title in SCORES}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curve = roc_curve(features, labels, device)
    unified = thresholds.unify(features, labels, learned, device)
    spread = thresholds.per_identity(features, labels, device)
    counts = plots.count_all(features, labels, device)
    histogram = plots.histogram("Scores", counts, learned, unified.best)
    dots = plots.identity_thresholds(spread, learned, unified.best)
    figures: Blocks = [
        Plot(plots.roc({"held out": curve}), f"ROC of all {pairs} pairs"),
        Plot(histogram, "Cosines of pairs, each kind to its own area"),
        Plot(dots, "The best threshold of each identity"),
    ]
    rates = [(f"{p.far:g}", p.tar, p.threshold, p.achieved_far) for p in curve.at]
    roc: Blocks = [Table(["FAR", "TAR", "threshold", "achieved FAR"], rates, "Points of the ROC")]
    if curve.unresolved:
        unresolved = ", ".join(f"{far:g}" for far in curve.unresolved)
        roc.append(Note(f"Too few negative pairs for FAR {unresolved}."))
    cosines = [
        ["best for these pairs", unified.best, unified.accuracy_at_best],
        ["learned b / s", learned, unified.accuracy_at_learned],
        ["learned - best", unified.gap, None],
    ]
    header = ["threshold", "cosine", "balanced accuracy"]
    scores: Blocks = [Table(header, cosines, "One threshold for all identities")]
    center = unified.best if learned is None else learned
    far_off = np.argsort(-np.abs(spread.thresholds - center), kind="stable")[:LISTED_IDENTITIES]
    table = spread.columns(names)
    order = ("identity", "threshold", "accuracy", "highest_negative", "lowest_positive")
    rows = [[table[name][i] for name in order] for i in far_off]
    metrics = _spaced(spread.to_dict(unified))
    many = thresholds.identify(features, labels, learned, device)
    if many is not None:
        metrics += _spaced(asdict(many), "1:N ")
    header = [name.replace("_", " ") for name in order]
    identities: Blocks = [
        Table(["metric", "value"], metrics, "One threshold for each identity"),
        Table(header, rows, "Farthest from the unified threshold"),
    ]
    return curve, figures, dict(zip(SCORES, (roc, scores, identities), strict=True))


def _about(config: Path, lines: list[dict[str, Any]]) -> str:
    """Backbone, losses, images and the last step, as far as they are known."""
    values: dict[str, Any] = {}
    with suppress(UserError):  # it is shown as it is, whatever it is
        values = read_yaml(config) if config.is_file() else {}
    keys = (("model", "name"), ("loss", "class"), ("loss", "pair"), ("data", "path"))
    found = [str((values.get(section) or {}).get(key, "")) for section, key in keys]
    step = f"step {lines[-1].get('step')}, epoch {lines[-1]['epoch']:g}" if lines else ""
    return ", ".join(name for name in (*found, step) if name not in ("", "none"))


def write(run_folder: Path) -> Path:
    """``report.html`` of a run folder, out of the files in it."""
    folder = Path(run_folder)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is no run folder: it has no {METRICS}")
    lines, evaluations = _lines(folder / METRICS), _lines(folder / EVALUATIONS)
    evaluations = [line for line in evaluations if _is_of_sets(line.get("eval"))]
    evaluation, features = _evaluation(folder / EVALUATION), _features(folder / FEATURES)
    learned = evaluation.get("threshold") if evaluation else None
    if evaluation is None and lines:
        learned = lines[-1].get("threshold")
    last = {
        name: {"step": line.get("step"), **metrics}
        for line in evaluations
        for name, metrics in line["eval"].items()
    }
    curve, figures, scores = _scores(features, learned)
    only_pairs = features is None and evaluation is None and bool(last) and "held_out" not in last
    config = folder / CONFIG
    configuration: Block = Note(f"This run has no {CONFIG}.")
    if config.is_file():
        configuration = Code(config.read_text(encoding="utf-8"))
    versions = f"unitsface_kernels {uk.__version__}, Torch {torch.__version__}, NumPy "
    versions += f"{np.__version__}, Python {platform.python_version()} wrote this page."
    missing = Note("This run has not been evaluated.")
    shown: dict[str, Blocks] = {
        **({"Identities held out": figures} if figures else {}),
        **({"Test sets": [_sets(last)]} if last else {}),
        "Training": [*_training(lines, evaluations), *([] if last or evaluation else [missing])],
    }
    folded = {
        **({"Scores of identities": [ONLY_PAIRS]} if only_pairs else {}),
        **({} if only_pairs else {"Metrics": _results(evaluation), **scores}),
        "Configuration": [configuration, Note(versions)],
    }
    numbers = _numbers(lines, evaluation, last, curve)
    title, about = f"Run {folder.resolve().name}", _about(config, lines)
    with reported(f"cannot write {folder / REPORT}"):
        write_html(folder / REPORT, Report(title, about, numbers, shown, folded))
    return folder / REPORT


def run(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train/html_report.py", description="A run as one HTML page.")
    parser.add_argument("run_folder", type=Path, help="run.dir of a run, finished or not")
    print(f"report: {write(parser.parse_args(argv).run_folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run))
