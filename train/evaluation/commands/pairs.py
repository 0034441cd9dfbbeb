"""All pairs of a folder of images with one sub-folder per identity."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

HELP = "all pairs of a folder of images: accuracy, AUC, TAR at FAR"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", help="folder with one sub-folder of images per identity, or 'orl'")


def run(arguments: Namespace) -> int:
    from train.data.dataset import scan
    from train.evaluation.embed import embed
    from train.evaluation.model import load_model, open_images_of
    from train.evaluation.verification import evaluate_features
    from train.run_folder import write_json

    model = load_model(arguments)
    source = open_images_of(model, scan(arguments.data), arguments)
    features, labels = embed(model.backbone, source, model.device)
    result = evaluate_features(features, labels, threshold=model.threshold, device=model.device)
    print(f"{len(source.images.identities)} identities, {result.pairs} pairs: {result}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "pairs.json", result.to_dict())
    return 0
