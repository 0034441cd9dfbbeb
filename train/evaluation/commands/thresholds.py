"""One threshold for everybody: the learned one against the best one of each set, the best one of
each identity (UniTSFace's figure 1), and accuracies of one against many at a single threshold."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluation.commands.pairs import (
    add_last,
    embed_folder,
    make_folder,
    open_folder,
    plot_scores,
)

HELP = "the learned threshold against the best ones: of each set, of each identity"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        default=["orl"],
        metavar="SET",
        help="folders with one sub-folder of images per identity, 'orl', or verification sets "
        "(.bin files), whose pairs have no identities: only the unified threshold is judged there",
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


def open_pairs(path: str, model: Any, arguments: Namespace) -> Any:
    """A verification set, as training opens those of ``eval.sets``."""
    from dataclasses import replace

    from train.data.image_list import whole
    from train.data.records import Encoded
    from train.evaluation.test_sets import open_test_sets

    config = model.config
    data = replace(config.data, workers=arguments.workers, on_error=arguments.on_error)
    config = replace(config, data=data, eval=replace(config.eval, sets=[path]))
    nobody = whole(Encoded([], ""), [], [])
    (test_set,) = open_test_sets(config, nobody)
    return test_set


def judge_pairs(test_set: Any, model: Any, arguments: Namespace, name: str) -> dict[str, Any]:
    """Its accuracy is that of its own protocol: at thresholds that are best on other pairs."""
    from train.evaluation.bins import BinSet
    from train.evaluation.embed import embed

    features, _ = embed(
        model.backbone, test_set.source, model.device, batch_size=arguments.batch_size
    )
    figures = test_set.score(features, threshold=model.threshold, device=model.device)
    best, learned = figures["best_threshold"], model.threshold
    if arguments.out is not None and isinstance(test_set, BinSet):
        plot_scores(name, *test_set.pair_scores(features), (learned, best), arguments)
    unified = {
        "pairs": figures.get("pairs"),
        "best": best,
        "accuracy": figures["accuracy"],
        "learned": learned,
        "accuracy_at_learned": figures.get("accuracy_at_threshold"),
        "gap": None if learned is None else learned - best,
    }
    return {"unified": unified, "per_identity": None, "identification": None}


def judge_folder(
    images: Any, path: str, model: Any, arguments: Namespace, name: str
) -> dict[str, Any]:
    """Of all pairs, of each identity, and of one against many; with files in ``--out``."""
    from train.evaluation import thresholds

    source, features, labels = embed_folder(images, path, model, arguments)
    given = (features, labels, model.threshold, model.device)
    unified, many = thresholds.unify(*given), thresholds.identify(*given)
    spread = thresholds.per_identity(features, labels, model.device)
    if arguments.out is not None:
        from train.evaluation import plots

        figure = plots.identity_thresholds(spread, unified.learned, unified.best)
        plots.save(figure, arguments.out / f"{name}.png")
        thresholds.write_csv(spread, source.images.identities, arguments.out / f"{name}.csv")
    return {
        "unified": unified.to_dict(),
        "per_identity": spread.to_dict(unified),
        "identification": None if many is None else many.to_dict(),
    }


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A row per set; a dash where there is nothing to tell."""
    from train.tools.report import layout

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
    return layout(header, rows)


def run(arguments: Namespace) -> int:
    from train.evaluation.model import load_model
    from train.run_folder import write_json

    model = load_model(arguments)
    # All are opened before the first is judged: a mistake in the last costs no waiting.
    sets = [
        open_pairs(path, model, arguments)
        if path.endswith(".bin")
        else open_folder(path, arguments.last, arguments.on_error)
        for path in arguments.data
    ]
    make_folder(arguments.out)
    reports: dict[str, dict[str, Any]] = {}
    names = unique_names(arguments.data)
    for name, path, opened in zip(names, arguments.data, sets, strict=True):
        if hasattr(opened, "score"):
            reports[name] = judge_pairs(opened, model, arguments, name)
        else:
            reports[name] = judge_folder(opened, path, model, arguments, name)
    print(table(reports))
    if model.threshold is None:
        print("this model's losses learn no unified threshold")
    if arguments.out is not None:
        write_json(arguments.out / "thresholds.json", reports)
    return 0
