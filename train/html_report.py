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

if not __package__:  # started as a script: sys.path[0] is train/, the package is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.errors import Parser, UserError, exit_code
from train.html_page import figure, missing, page, preformatted, table
from train.run_folder import CONFIG, EVALUATION, EVALUATIONS, FEATURES, METRICS, write_text
from train.small_files import load_npz, parse_json, read_text

REPORT = "report.html"
# Of the identities whose own threshold is farthest from the unified one.
LISTED_IDENTITIES = 10
ONLY_PAIRS = (
    "<p>ROC, histograms and thresholds per identity are of identities held out of training "
    "(data.holdout). This run has none; train/evaluate.py verification --out draws the pairs of "
    "its sets.</p>"
)


# -- what a run folder holds ----------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; none where there is no file."""
    if not path.exists():
        return []
    found = []
    # What comes after the last end of a line is being written, or was when the process died.
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


def _results(evaluation: dict[str, Any] | None, evaluations: list[dict[str, Any]]) -> str:
    """Tables of figures: of the final evaluation, and of every set when last evaluated."""
    from train.evaluation.rates import without_unresolved

    parts = []
    if evaluation is not None:
        flat: dict[str, Any] = {}
        for key, value in evaluation.items():
            if isinstance(value, dict):
                flat |= {f"{key.replace('tar_at_far', 'tar')}@far={k}": v for k, v in value.items()}
            else:
                flat[key] = value
        if "pairs" in evaluation and "positives" in evaluation:
            flat = without_unresolved(flat, evaluation["pairs"] - evaluation["positives"])
        rows = [(key.replace("_", " "), value) for key, value in flat.items()]
        parts.append("<p>Identities held out, all pairs:</p>" + table(["figure", "value"], rows))
    last: dict[str, dict[str, Any]] = {}
    for line in evaluations:
        for name, figures in line["eval"].items():
            last[name] = {"step": line.get("step"), **figures}
    if last:
        keys = list(dict.fromkeys(key for figures in last.values() for key in figures))
        rows = [(name, *(figures.get(key) for key in keys)) for name, figures in last.items()]
        parts.append("<p>Every set, when last evaluated:</p>")
        parts.append(table(["set", *(key.replace("_", " ") for key in keys)], rows))
    return "\n".join(parts) or missing("This run has not been evaluated.")


def _training(lines: list[dict[str, Any]], evaluations: list[dict[str, Any]], name: str) -> str:
    from train.evaluation import plots

    if not lines:
        return missing("This run has not logged a step.")
    curves = _by_figure(evaluations)
    best = curves.pop("best_threshold", {})
    parts = [
        figure(plots.loss_curves({name: lines}, best), "Loss, and the learned threshold b / s"),
        figure(plots.speed(lines), "Learning rate and images per second"),
    ]
    if curves:
        caption = "Figures of the test sets in the course of training"
        parts.append(figure(plots.evaluations(curves), caption))
    return "\n".join(parts)


def _by_figure(evaluations: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list, list]]]:
    """Epochs and values by figure and set."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in evaluations:
        for name, figures in line["eval"].items():
            for key, value in figures.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    epochs, values = curves.setdefault(key, {}).setdefault(name, ([], []))
                    epochs.append(line["epoch"])
                    values.append(value)
    return curves


def _scores(found: tuple[Any, Any, list[str]] | None, learned: float | None) -> dict[str, str]:
    """ROC, histograms and thresholds of the identities held out."""
    import torch

    from train.evaluation import plots, thresholds
    from train.evaluation.roc import roc_curve
    from train.evaluation.verification import count_pairs

    titles = ("ROC", "Scores", "A threshold per identity")
    if found is None:
        return dict.fromkeys(titles, missing(f"This run has no {FEATURES}."))
    features, labels, names = found
    pairs, positives = count_pairs(labels)
    if positives in (0, pairs):
        return dict.fromkeys(titles, missing("Its images form no positive or no negative pair."))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curve = roc_curve(features, labels, device)
    unified = thresholds.unify(features, labels, learned, device)
    rates = [(f"{p.far:g}", p.tar, p.threshold, p.achieved_far) for p in curve.at]
    unresolved = ", ".join(f"{far:g}" for far in curve.unresolved)
    parts = {
        titles[0]: figure(plots.roc({"held out": curve}), f"ROC of all {pairs} pairs")
        + table(["FAR", "TAR", "threshold", "achieved FAR"], rates)
        + (missing(f"Too few negative pairs for FAR {unresolved}.") if unresolved else ""),
        titles[1]: figure(
            plots.histograms(
                {"held out": plots.count_all(features, labels, device)},
                {"held out": (learned, unified.best)},
            ),
            "Cosines of positive and of negative pairs, each to its own area",
        )
        + table(
            ["threshold", "cosine", "balanced accuracy"],
            [
                ("best for these pairs", unified.best, unified.accuracy_at_best),
                ("learned b / s", learned, unified.accuracy_at_learned),
                ("learned - best", unified.gap, None),
            ],
        ),
    }
    spread = thresholds.per_identity(features, labels, device)
    center = unified.best if learned is None else learned
    far_off = sorted(
        range(len(spread.identities)), key=lambda i: -abs(spread.thresholds[i] - center)
    )
    columns = (
        spread.thresholds,
        spread.accuracies,
        spread.highest_negative,
        spread.lowest_positive,
    )
    rows = [
        (names[spread.identities[i]], *(float(column[i]) for column in columns))
        for i in far_off[:LISTED_IDENTITIES]
    ]
    header = ["identity", "threshold", "accuracy", "highest negative", "lowest positive"]
    figures = [(k.replace("_", " "), v) for k, v in spread.to_dict(unified).items()]
    many = thresholds.identify(features, labels, learned, device)
    if many is not None:
        figures += [(f"1:N {k.replace('_', ' ')}", v) for k, v in many.to_dict().items()]
    parts[titles[2]] = (
        figure(
            plots.identity_thresholds(spread, learned, unified.best),
            "The best threshold of each identity beside the unified one",
        )
        + table(["figure", "value"], figures)
        + "<p>Farthest from the unified threshold:</p>"
        + table(header, rows)
    )
    return parts


def _versions() -> str:
    import numpy as np
    import torch

    import unitsface_kernels as uk

    rows = [
        ("unitsface_kernels", uk.__version__),
        ("Torch", torch.__version__),
        ("NumPy", np.__version__),
        ("Python", platform.python_version()),
    ]
    return "<p>Of what wrote this page:</p>" + table(["package", "version"], rows)


def write(run_folder: Path) -> Path:
    """``report.html`` of a run folder, out of what is in there."""

    folder = Path(run_folder)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is no run folder: it has no {METRICS}")
    lines, evaluations = _lines(folder / METRICS), _lines(folder / EVALUATIONS)
    evaluations = [line for line in evaluations if isinstance(line.get("eval"), dict)]
    evaluation, features = _evaluation(folder / EVALUATION), _features(folder / FEATURES)
    learned = evaluation.get("threshold") if evaluation else None
    if evaluation is None and lines:
        learned = lines[-1].get("threshold")
    config = folder / CONFIG
    name = folder.resolve().name
    scores = _scores(features, learned)
    sets = {name for line in evaluations for name in line["eval"]}
    only_pairs = features is None and evaluation is None and bool(sets) and "held_out" not in sets
    sections = {
        "Results": _results(evaluation, evaluations) + (ONLY_PAIRS if only_pairs else ""),
        "Training": _training(lines, evaluations, name),
        **({} if only_pairs else scores),
        "Configuration": preformatted(config.read_text(encoding="utf-8"))
        if config.is_file()
        else missing(f"This run has no {CONFIG}."),
        "Versions": _versions(),
    }
    try:
        write_text(folder / REPORT, page(name, sections))
    except OSError as error:
        raise UserError(f"cannot write {folder / REPORT}: {error.strerror}") from error
    return folder / REPORT


def run(argv: list[str]) -> int:
    parser = Parser(prog="train/html_report.py", description="A run as one HTML page.")
    parser.add_argument("run_folder", type=Path, help="run.dir of a run, finished or not")
    print(f"report: {write(parser.parse_args(argv).run_folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))
