"""Features of images of which some cannot be read, and features kept in a file."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from train.data.image_list import whole
from train.data.loader import open_images
from train.data.records import Records
from train.errors import UserError
from train.evaluation.embed import embed
from train.evaluation.model import Model


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
    """A .npy file of (rows, D) floats; objects, which would be unpickled, are refused."""
    try:
        with open(path, "rb") as file:
            shape, columns_first, dtype = _npy_header(file)
            floats = np.issubdtype(dtype, np.floating)
            if len(shape) != 2 or shape[0] != rows or shape[1] < 0 or not floats:
                raise UserError(f"{path}: expected {rows} rows of floats, got {shape} of {dtype}")
            here, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
            if here > there:
                raise UserError(f"{path}: expected {here} bytes of numbers, it has {there}")
            numbers = np.fromfile(file, dtype, math.prod(shape))
            matrix = numbers.reshape(shape, order="F" if columns_first else "C")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except _HeaderError as error:
        raise UserError(f"{path}: not a .npy file, or damaged: {error}") from error
    with np.errstate(over="ignore"):  # of float64, said where features are not finite
        return np.ascontiguousarray(matrix, dtype=np.float32)


class _HeaderError(Exception):
    """The reason."""


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        major, _ = np.lib.format.read_magic(file)
        if major == 1:
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # of Python's parser and tokenizer, and numpy's of data types
        raise _HeaderError(" ".join(str(error).split())[:200] or type(error).__name__) from error
