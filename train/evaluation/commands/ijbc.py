"""IJB-C or IJB-B: verification of templates (1:1) and search in galleries (1:N)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

HELP = "IJB-C and IJB-B: TAR at FAR of templates (1:1), search in galleries (1:N)"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--meta", type=Path, required=True, help="folder of the meta files")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of the loosely cropped faces"
    )
    parser.add_argument("--protocol", default="both", choices=("11", "1N", "both"))
    parser.add_argument("--set", default="ijbc", choices=("ijbc", "ijbb"))
    parser.add_argument(
        "--no-norm-weight", action="store_true", help="images weigh alike, not by feature norm"
    )
    parser.add_argument(
        "--no-detector-weight", action="store_true", help="ignore the face detector's scores"
    )


def run(arguments: Namespace) -> int:
    from train.errors import UserError
    from train.evaluation.ijb import meta, search, templates
    from train.evaluation.ijb.align import AlignedFaces
    from train.evaluation.model import load_model
    from train.evaluation.readable import embed_readable
    from train.run_folder import write_json

    folder, prefix = arguments.meta, arguments.set
    # Every list is read before the images are, which takes long.
    faces = meta.read_faces(folder, prefix)
    pairs = subjects = None
    if arguments.protocol != "1N":
        pairs = meta.read_pairs(folder, prefix, faces)
    if arguments.protocol != "11":
        subjects = meta.read_search(folder, prefix, faces)
    if not arguments.images.is_dir():
        raise UserError(f"no such folder: {arguments.images}")
    model = load_model(arguments)
    paths = [str(arguments.images / name) for name in faces.names]
    features, read = embed_readable(model, AlignedFaces(paths, faces.landmarks), arguments)
    pooled = templates.pool(
        features[read],
        faces.templates[read],
        faces.media[read],
        scores=None if arguments.no_detector_weight else faces.scores[read],
        norms=not arguments.no_norm_weight,
    )
    figures: dict[str, Any] = {"images": len(read), "skipped_images": int((~read).sum())}
    print(f"{len(read)} images ({figures['skipped_images']} skipped), {len(pooled.ids)} templates")
    if pairs is not None:
        figures["1:1"] = templates.verify(pooled, *pairs)
        print("1:1        " + _line(figures["1:1"]))
    if subjects is not None:
        figures["1:N"] = search.both_galleries(pooled, *subjects)
        for name, values in figures["1:N"].items():
            print(f"{name:<11}" + _line(values))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / f"{prefix}.json", figures)
    return 0


def _line(values: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4f}"
        for name, value in values.items()
    )
