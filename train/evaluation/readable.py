"""Features of images of which some cannot be read, and features kept in a file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.image_list import whole
from train.data.loader import open_images
from train.data.records import Records
from train.errors import UserError
from train.evaluation.embed import embed
from train.evaluation.model import Model
from train.small_files import load_npy


def embed_readable(
    model: Model, records: Records, arguments: Namespace
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(N, D) flip-summed features, and which of them are of their own image.

    With ``--on-error skip`` the others are some other image's; without it they are an error.
    """
    source = open_images(
        whole(records, [0] * len(records), [""]),
        model.config.model.input_size,
        on_error=arguments.on_error,
        cache="never",
        workers=arguments.workers,
        max_pixels=model.config.data.max_pixels,
    )
    features, _ = embed(model.backbone, source, model.device, batch_size=arguments.batch_size)
    return features, source.readable()


def read_matrix(path: Path, *, rows: int) -> NDArray[np.float32]:
    """A .npy file of (rows, D) floats."""
    matrix = load_npy(path)
    if matrix.ndim != 2 or len(matrix) != rows or not np.issubdtype(matrix.dtype, np.floating):
        raise UserError(
            f"{path}: expected {rows} rows of floats, got {matrix.shape} of {matrix.dtype}"
        )
    with np.errstate(over="ignore"):  # of float64, said where features are not finite
        return np.ascontiguousarray(matrix, dtype=np.float32)
