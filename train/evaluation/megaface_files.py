"""Files of MegaFace: which images it consists of, and features of the devkit.

Lists are insightface's (``facescrub_lst``, ``megaface_lst``: a path per line) or the devkit's
(``facescrub_features_list.json``, ``megaface_features_list.json_1000000_1``: a JSON object with
``path``, and for FaceScrub ``id``, the person). Without a list, all images of the folder in order.

Images that insightface found to show another person (``facescrub_noises.txt``: file names,
``megaface_noises.txt``: the last three parts of paths, possibly after a tab) are left out.
insightface puts the mean of the person's other features in the place of such a probe, which makes a
probe that is easy; a distractor it moves out of reach, which has the same effect.

Feature files hold an OpenCV matrix each: four int32 (rows, columns, bytes per row, type 5 =
CV_32F), then float32, all little-endian. Written as insightface does (``write_bin`` in
gen_megaface.py): D rows of one column.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.folder import LeftOut, is_image
from train.errors import UserError, reported
from train.evaluation.lists import inside, lines
from train.small_files import parse_json, read_text

HEADER = struct.Struct("<4i")
CV_32F = 5
LARGEST = 2**20  # numbers; features have some hundreds
# Images of a person are person/file, distractors folder/folder/file.
PARTS = {"facescrub": 2, "megaface": 3}


class FeatureError(Exception):
    """A feature file that cannot be read; the message names it."""


@dataclass(frozen=True)
class Listed:
    names: list[str]  # relative to the folder of the images
    people: list[str]  # of probes; empty for distractors


def read_list(path: Path | None, folder: Path, *, people: bool) -> Listed:
    """Names of images and, with ``people``, the person shown: by the list, else by their folder."""
    if path is None:
        names, ids = _scan(folder), None
    elif _is_json(path):
        names, ids = _read_json(path)
    else:
        names, ids = [inside(line, where) for where, line in lines(path)], None
    if not names:
        raise UserError(f"{path or folder}: no images")
    if not people:
        return Listed(names, [])
    if ids is None:
        for name in names:
            if "/" not in name:
                raise UserError(f"{path or folder}: expected person/file, got {name[:80]!r}")
        ids = [name.split("/")[-2] for name in names]
    return Listed(names, ids)


def _scan(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    left_out, unreadable = LeftOut(), list[str]()
    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=lambda e: unreadable.append(e.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = sorted(name for name in files if not name.startswith("."))
        paths = {name: Path(parent, name).relative_to(folder).as_posix() for name in names}
        found += [path for name, path in paths.items() if is_image(name)]
        others = [path for name, path in paths.items() if not is_image(name)]
        left_out.add("file(s) without the ending of an image that is read", others)
    left_out.add("folder(s) that cannot be read", sorted(unreadable))
    left_out.report(str(folder))
    return sorted(found)


def _is_json(path: Path) -> bool:
    first = next(lines(path), ("", ""))[1]
    return first.startswith(("{", "["))


def _read_json(path: Path) -> tuple[list[str], list[str] | None]:
    values = parse_json(read_text(path), path)
    names = values.get("path") if isinstance(values, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected an object with 'path', a list of file names")
    checked = [inside(name, f"{path}, path {i}") for i, name in enumerate(names)]
    ids = values.get("id")
    if ids is None:
        return checked, None
    if not isinstance(ids, list) or len(ids) != len(names):
        raise UserError(f"{path}: expected 'id' to be a list as long as 'path'")
    if not all(isinstance(person, (str, int)) for person in ids):
        raise UserError(f"{path}: expected 'id' to be a list of names or numbers")
    return checked, [str(person) for person in ids]


def read_noises(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    return frozenset(
        line.split("\t")[-1].strip() for _, line in lines(path) if not line.startswith("#")
    )


def without_noises(listed: Listed, noises: frozenset[str], parts: int) -> Listed:
    """The images whose last ``parts`` of the path are not among the noises."""
    good = [
        i for i, name in enumerate(listed.names) if "/".join(name.split("/")[-parts:]) not in noises
    ]
    people = [listed.people[i] for i in good] if listed.people else []
    return Listed([listed.names[i] for i in good], people)


def write_feature(path: Path, feature: NDArray[np.float32]) -> None:
    """A (D,) feature."""
    header = HEADER.pack(len(feature), 1, 4, CV_32F)
    with reported(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header + feature.astype("<f4").tobytes())


def read_feature(path: Path) -> NDArray[np.float32]:
    """The numbers of a matrix, flat."""
    with reported(f"cannot read {path}", error=FeatureError), open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise FeatureError(f"{path}: cut off in its header of 16 bytes")
        rows, columns, stride, kind = HEADER.unpack(header)
        sizes = f"{rows} x {columns}, {stride} bytes per row, type {kind}"
        if kind != CV_32F or min(rows, columns) < 1 or stride != 4 * columns:
            raise FeatureError(f"{path}: expected a float32 matrix without gaps, got {sizes}")
        if rows * columns > LARGEST:
            raise FeatureError(f"{path}: expected at most {LARGEST} numbers, got {sizes}")
        data = file.read(rows * stride + 1)
    if len(data) != rows * stride:
        has = "more" if len(data) > rows * stride else str(len(data))
        raise FeatureError(f"{path}: expected {rows * stride} bytes of numbers, it has {has}")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise FeatureError(f"{path}: its numbers are not finite")
    return values


def feature_path(root: Path, name: str, algorithm: str, *, kind: str) -> Path:
    """The devkit's place: ``facescrub/person/file_algorithm.bin`` and
    ``megaface/folder/folder/file_algorithm.bin``.
    """
    return root / kind / ("/".join(name.split("/")[-PARTS[kind] :]) + f"_{algorithm}.bin")


def read_features(
    paths: list[Path], *, skip: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(N, D) features, and which of them could be read; zeros for the others."""
    found: dict[int, NDArray[np.float32]] = {}
    for i, path in enumerate(paths):
        try:
            found[i] = read_feature(path)
        except FeatureError as error:
            if not skip:
                raise UserError(f"{error} (data.on_error=skip leaves such files out)") from error
    if not found:
        raise UserError(f"none of {len(paths)} feature files can be read: {paths[0]}, ...")
    sizes = {len(feature): i for i, feature in found.items()}
    if len(sizes) > 1:
        given = ", ".join(f"{size} in {paths[i]}" for size, i in sizes.items())
        raise UserError(f"features of different sizes: {given}")
    features = np.zeros((len(paths), *sizes), dtype=np.float32)
    for i, feature in found.items():
        features[i] = feature
    return features, np.isin(np.arange(len(paths)), list(found))
