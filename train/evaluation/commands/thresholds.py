"""One threshold for everybody: the learned one against the best one of each set, the best one of
each identity (UniTSFace's figure 1), and accuracies of one against many at a single threshold."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluation.commands.pairs import add_last, open_folder

HELP = "the learned threshold against the best ones: of each set, of each identity"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        default=["orl"],
        metavar="FOLDER",
        help="folders with one sub-folder of images per identity, or 'orl'",
    )
    add_last(parser)


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
    """A row per set; a dash where there is nothing to tell."""
    from train.report import layout

    header = ["set", "pairs", "best", "accuracy", "learned b/s", "accuracy", "gap"]
    header += ["identities: mean ± std", "1:N", "1:N uniform", "at b/s"]

    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for name, report in reports.items():
        unified, spread = report["unified"], report["per_identity"]
        many = report["identification"] or {}
        row = [name, str(unified["pairs"])]
        row += [show(unified[key]) for key in ("best", "accuracy_at_best", "learned")]
        row += [show(unified["accuracy_at_learned"]), show(unified["gap"], "+.3f")]
        row.append(f"{spread['mean']:.3f} ± {spread['std']:.3f}")
        row += [show(many.get(k)) for k in ("sample_wise", "uniform", "uniform_at_learned")]
        rows.append(row)
    return layout(header, rows)


def run(arguments: Namespace) -> int:
    from train.evaluation import thresholds
    from train.evaluation.embed import embed
    from train.evaluation.model import load_model, open_images_of
    from train.run_folder import write_json

    model = load_model(arguments)
    sets = [open_folder(path, arguments.last) for path in arguments.data]
    reports: dict[str, dict[str, Any]] = {}
    for name, images in zip(unique_names(arguments.data), sets, strict=True):
        source = open_images_of(model, images, arguments)
        features, labels = embed(model.backbone, source, model.device)
        given = (features, labels, model.threshold, model.device)
        unified, many = thresholds.unified_of_features(*given), thresholds.identify(*given)
        spread = thresholds.per_identity(features, labels, model.device)
        reports[name] = {
            "unified": unified.to_dict(),
            "per_identity": spread.to_dict(unified),
            "identification": None if many is None else many.to_dict(),
        }
        if arguments.out is not None:
            from train.evaluation import plots

            arguments.out.mkdir(parents=True, exist_ok=True)
            figure = plots.identity_thresholds(spread, unified.learned, unified.best)
            plots.save(figure, arguments.out / f"{name}.png")
            names = source.images.identities
            thresholds.write_csv(spread, names, arguments.out / f"{name}.csv")
    print(table(reports))
    if model.threshold is None:
        print("this model's losses learn no unified threshold")
    if arguments.out is not None:
        write_json(arguments.out / "thresholds.json", reports)
    return 0
