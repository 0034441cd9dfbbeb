"""IJB-C or IJB-B: verification of templates (1:1) and search in galleries (1:N)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from train.evaluation.ijb.meta import Faces

HELP = "IJB-C and IJB-B: TAR at FAR of templates (1:1), search in galleries (1:N)"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--meta", type=Path, required=True, help="folder of the meta files")
    parser.add_argument("--images", type=Path, help="folder of the loosely cropped faces")
    parser.add_argument("--protocol", default="both", choices=("11", "1N", "both"))
    parser.add_argument("--set", default="ijbc", choices=("ijbc", "ijbb"))
    parser.add_argument(
        "--no-norm-weight", action="store_true", help="images weigh alike, not by feature norm"
    )
    parser.add_argument(
        "--no-detector-weight", action="store_true", help="ignore the face detector's scores"
    )
    parser.add_argument(
        "--write-features", type=Path, metavar="FILE", help="keep the images' features, a .npy"
    )
    parser.add_argument(
        "--read-features", type=Path, metavar="FILE", help="take them from there, not from images"
    )


def run(arguments: Namespace) -> int:
    from train.evaluation.commands.pairs import make_folder
    from train.evaluation.ijb import meta, search, templates
    from train.evaluation.rates import without_unresolved
    from train.run_folder import write_json

    folder, prefix = arguments.meta, arguments.set
    # Every list is read before the images are, which takes long.
    faces = meta.read_faces(folder, prefix)
    pairs = subjects = None
    if arguments.protocol != "1N":
        pairs = meta.read_pairs(folder, prefix, faces)
    if arguments.protocol != "11":
        subjects = meta.read_search(folder, prefix, faces)
    make_folder(arguments.out)
    features, read = _features(faces, arguments)
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
        found = templates.verify(pooled, *pairs)
        figures["1:1"] = without_unresolved(found, int(found["pairs"] - found["positives"]))
        print("1:1        " + _line(figures["1:1"]))
    if subjects is not None:
        figures["1:N"] = search.both_galleries(pooled, *subjects)
        for name, values in figures["1:N"].items():
            print(f"{name:<11}" + _line(values))
    if arguments.out is not None:
        write_json(arguments.out / f"{prefix}.json", figures)
    return 0


def _features(faces: Faces, arguments: Namespace) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(N, D) flip-summed features, and of which images; in a file, the others are not numbers."""
    import numpy as np

    from train.errors import UserError
    from train.evaluation.ijb.align import AlignedFaces
    from train.evaluation.model import load_model
    from train.evaluation.readable import embed_readable, read_matrix

    if arguments.read_features is not None:
        features = read_matrix(arguments.read_features, rows=len(faces.names))
        return features, np.isfinite(features).all(1)
    if arguments.images is None or not arguments.images.is_dir():
        raise UserError(f"--images: no such folder: {arguments.images}")
    paths = [str(arguments.images / name) for name in faces.names]
    records = AlignedFaces(paths, faces.landmarks)
    features, read = embed_readable(load_model(arguments), records, arguments)
    if arguments.write_features is not None:
        features[~read] = np.nan
        try:
            with open(arguments.write_features, "wb") as file:
                np.save(file, features)
        except OSError as error:
            raise UserError(f"cannot write {arguments.write_features}: {error}") from error
    return features, read


def _line(values: dict[str, Any]) -> str:
    from train.evaluation.rates import shown

    return "  ".join(f"{name} {shown(value)}" for name, value in values.items())
