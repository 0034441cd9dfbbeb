"""MegaFace: identification and verification of probes among distractors, in blocks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from train.evaluation.model import Model

HELP = "MegaFace: identification and verification among distractors"
BLOCK = 16384  # distractors embedded at a time: 32 MB of features

# Images of a person are person/file, distractors folder/folder/file.
PARTS = {"facescrub": 2, "megaface": 3}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--probes", type=Path, required=True, help="folder of FaceScrub's images")
    parser.add_argument("--gallery", type=Path, required=True, help="folder of the distractors")
    for name, list_name in (("probe", "facescrub_lst"), ("gallery", "megaface_lst")):
        parser.add_argument(
            f"--{name}-list", type=Path, help=f"{list_name} or the devkit's JSON; else all images"
        )
    parser.add_argument("--probe-noises", type=Path, help="facescrub_noises.txt")
    parser.add_argument("--gallery-noises", type=Path, help="megaface_noises.txt")
    parser.add_argument(
        "--write-features",
        type=Path,
        metavar="DIR",
        help="for the devkit, DIR/{facescrub,megaface}",
    )
    parser.add_argument(
        "--read-features",
        type=Path,
        metavar="DIR",
        help="take features from there, not from images",
    )
    parser.add_argument("--algorithm", default="unitsface", help="end of feature files' names")


def run(arguments: Namespace) -> int:
    from tqdm import tqdm

    from train.distributed import choose_device
    from train.errors import UserError
    from train.evaluation.commands.pairs import make_folder
    from train.evaluation.megaface.identification import Identification
    from train.evaluation.megaface.lists import read_list, read_noises, without_noises
    from train.evaluation.model import load_model
    from train.evaluation.rates import shown, without_unresolved
    from train.run_folder import write_json

    if "/" in arguments.algorithm:
        raise UserError(f"--algorithm: expected a part of a file name, got {arguments.algorithm}")
    probes = read_list(arguments.probe_list, arguments.probes, people=True)
    gallery = read_list(arguments.gallery_list, arguments.gallery, people=False)
    listed = len(probes.names), len(gallery.names)
    probes = without_noises(probes, read_noises(arguments.probe_noises), 1)
    gallery = without_noises(gallery, read_noises(arguments.gallery_noises), 3)
    if not probes.names or not gallery.names:
        raise UserError("nothing is left without the images listed as noise")
    make_folder(arguments.out)
    model = None if arguments.read_features is not None else load_model(arguments)

    features, read = _features(model, "facescrub", probes.names, arguments)
    people = [person for person, good in zip(probes.people, read, strict=True) if good]
    identification = Identification(
        features[read], people, len(gallery.names), device=choose_device(arguments.device, 0)
    )
    for start in tqdm(range(0, len(gallery.names), BLOCK), "distractors", disable=None):
        names = gallery.names[start : start + BLOCK]
        features, read = _features(model, "megaface", names, arguments)
        identification.add(features[read])
    found = identification.figures()
    figures = without_unresolved(found, int(found["negatives"])) | {
        "noise_probes": listed[0] - len(probes.names),
        "noise_distractors": listed[1] - len(gallery.names),
        "skipped_probes": len(probes.names) - len(people),
        "skipped_distractors": len(gallery.names) - identification.distractors,
    }
    for name, value in figures.items():
        print(f"{name:<20} {shown(value)}")
    if arguments.out is not None:
        write_json(arguments.out / "megaface.json", figures)
    return 0


def _features(
    model: Model | None, kind: str, names: list[str], arguments: Namespace
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features of images by the model, without one out of files; and which could be read."""
    import numpy as np

    from train.data.records import Files
    from train.evaluation.megaface.features import feature_path, read_features, write_feature
    from train.evaluation.readable import embed_readable

    def path(root: Path, name: str) -> Path:
        return feature_path(root, name, arguments.algorithm, kind=kind, parts=PARTS[kind])

    if model is None:
        skip = arguments.on_error == "skip"
        return read_features([path(arguments.read_features, name) for name in names], skip=skip)
    folder = arguments.probes if kind == "facescrub" else arguments.gallery
    features, read = embed_readable(model, Files([str(folder / n) for n in names]), arguments)
    if arguments.write_features is not None:
        lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        for name, feature, good in zip(names, features / lengths, read, strict=True):
            if good:
                write_feature(path(arguments.write_features, name), feature)
    return features, read
