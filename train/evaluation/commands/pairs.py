"""All pairs of a folder of images with one sub-folder per identity."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

HELP = "all pairs of a folder of images: accuracy, AUC, TAR at FAR, ROC"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", help="folder with one sub-folder of images per identity, or 'orl'")
    add_last(parser)
    parser.add_argument(
        "--roc",
        action="store_true",
        help="also TAR at FAR from 1e-6 to 0.1, and roc.csv and roc.png in --out",
    )


def add_last(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--last",
        type=int,
        default=0,
        metavar="N",
        help="only the last N identities, those that data.holdout=N keeps out of training; 0: all",
    )


def open_folder(path: str, last: int, on_error: str) -> Any:
    """The list of images of a folder, of its last identities only where ``last`` is not 0."""
    from dataclasses import replace

    import numpy as np

    from train.data.dataset import scan
    from train.errors import UserError

    images = scan(path, skip=on_error == "skip")
    left_out = images.left_out
    count = len(images.identities)
    if not 0 <= last <= count:
        raise UserError(f"--last: expected 0 to {count}, the identities of {path}, got {last}")
    if last:
        images = images.keep(np.flatnonzero(images.labels >= count - last))
    check_pairs(images.labels, path)
    return replace(images, left_out=left_out)


def embed_folder(images: Any, path: str, model: Any, arguments: Namespace) -> Any:
    """Source, features and labels of the images that can be read; says which ones cannot."""
    from train.evaluation.embed import embed
    from train.evaluation.model import open_images_of

    source = open_images_of(model, images, arguments)
    features, labels = embed(model.backbone, source, model.device, batch_size=arguments.batch_size)
    read = source.readable()
    features, labels = features[read], labels[read]
    check_pairs(labels, path)
    skipped = {**images.left_out, **source.skipped}
    if skipped:
        print(f"{path}: {len(skipped)} images skipped, such as {next(iter(skipped.values()))}")
    return source, features, labels


def check_pairs(labels: Any, path: str) -> None:
    from train.errors import UserError
    from train.evaluation.verification import count_pairs

    pairs, positives = count_pairs(labels)
    if positives in (0, pairs):
        kind = "positive" if positives == 0 else "negative"
        raise UserError(f"{path}: its images form no {kind} pair")


def make_folder(path: Path | None) -> None:
    from train.errors import UserError

    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {path}: {error.strerror}") from error


def plot_scores(
    name: str, scores: Any, same: Any, thresholds: tuple[float | None, float], arguments: Namespace
) -> None:
    """``<name>-scores.png`` in ``--out``: cosines of pairs, the learned and the best threshold."""
    from train.evaluation import plots

    drawn = plots.histograms({name: plots.count(scores, same)}, {name: thresholds})
    plots.save(drawn, arguments.out / f"{name}-scores.png")


def run(arguments: Namespace) -> int:
    from train.errors import UserError
    from train.evaluation.model import load_model
    from train.evaluation.verification import evaluate_features
    from train.run_folder import write_json

    if arguments.roc and arguments.out is None:
        raise UserError("--roc writes files: name a folder with --out")
    model = load_model(arguments)
    images = open_folder(arguments.data, arguments.last, arguments.on_error)
    make_folder(arguments.out)
    source, features, labels = embed_folder(images, arguments.data, model, arguments)
    result = evaluate_features(features, labels, threshold=model.threshold, device=model.device)
    print(f"{len(source.images.identities)} identities, {result.pairs} pairs: {result}")
    if arguments.out is None:
        return 0
    from train.evaluation import plots

    figures = result.to_dict()
    counts = plots.count_all(features, labels, model.device)
    thresholds = {arguments.data: (model.threshold, result.best_threshold)}
    drawn = plots.histograms({arguments.data: counts}, thresholds)
    plots.save(drawn, arguments.out / "scores.png")
    if arguments.roc:
        from train.evaluation.roc import roc_curve, write_csv

        curve = roc_curve(features, labels, model.device)
        print(curve)
        figures["roc"] = curve.to_dict()
        write_csv(curve, arguments.out / "roc.csv")
        plots.save(plots.roc({arguments.data: curve}, "All pairs"), arguments.out / "roc.png")
    write_json(arguments.out / "pairs.json", figures)
    return 0
