"""Encoded images to uint8 arrays of one size."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

PIXEL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadableImageError(Exception):
    """The message names the image."""


def decode(encoded: bytes, size: int, name: str) -> NDArray[np.uint8]:
    """Any image to (3, size, size): grey is repeated, other shapes are stretched to a square.

    Downscaling is antialiased (PIL's filters widen their support with the reduction).
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except PIXEL_ERRORS as error:
        raise UnreadableImageError(
            f"cannot read image {name}: {_reason(error, encoded)}"
        ) from error
    if upright.mode.startswith("I"):  # 16-bit grey: PIL would clip instead of scaling
        wide = np.asarray(upright, dtype=np.float32)
        upright = Image.fromarray((wide / 257.0).clip(0, 255).round().astype(np.uint8))
    rgb = upright.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _reason(error: BaseException, encoded: bytes) -> str:
    if not encoded:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):  # its own text is the address of the buffer
        return "no known image format"
    return str(error) or type(error).__name__
