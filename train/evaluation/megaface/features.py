"""Feature files of the MegaFace devkit: one per image, an OpenCV matrix.

Four int32 (rows, columns, bytes per row, type 5 = CV_32F), then float32, all little-endian. Written
as insightface does (``write_bin`` in gen_megaface.py): D rows of one column.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError

HEADER = struct.Struct("<4i")
CV_32F = 5
LARGEST = 2**20  # numbers; features have some hundreds


class FeatureError(Exception):
    """A feature file that cannot be read; the message names it."""


def write_feature(path: Path, feature: NDArray[np.float32]) -> None:
    """A (D,) feature."""
    header = HEADER.pack(len(feature), 1, 4, CV_32F)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header + feature.astype("<f4").tobytes())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_feature(path: Path) -> NDArray[np.float32]:
    """The numbers of a matrix, flat."""
    try:
        with open(path, "rb") as file:
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
    except OSError as error:
        raise FeatureError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) != rows * stride:
        has = "more" if len(data) > rows * stride else str(len(data))
        raise FeatureError(f"{path}: expected {rows * stride} bytes of numbers, it has {has}")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise FeatureError(f"{path}: its numbers are not finite")
    return values


def feature_path(root: Path, name: str, algorithm: str, *, kind: str, parts: int) -> Path:
    """Where the devkit looks for it: ``facescrub/person/file_algorithm.bin`` and
    ``megaface/folder/folder/file_algorithm.bin``.
    """
    return root / kind / ("/".join(name.split("/")[-parts:]) + f"_{algorithm}.bin")


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
                raise UserError(f"{error} (--on-error skip leaves such files out)") from error
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
