"""Image files to uint8 arrays of one size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

PIXEL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadableImageError(Exception):
    """The message names the file."""


def decode(path: str, size: int) -> NDArray[np.uint8]:
    """Any image file to (3, size, size): grey is repeated, other shapes are stretched to a square.

    Downscaling is antialiased (PIL's filters widen their support with the reduction).
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except PIXEL_ERRORS as error:
        raise UnreadableImageError(f"cannot read image {path}: {_reason(error, path)}") from error
    if upright.mode.startswith("I"):  # 16-bit grey: PIL would clip instead of scaling
        wide = np.asarray(upright, dtype=np.float32)
        upright = Image.fromarray((wide / 257.0).clip(0, 255).round().astype(np.uint8))
    rgb = upright.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _reason(error: BaseException, path: str) -> str:
    """PIL's reason, without the path that our own message already gives."""
    text = getattr(error, "strerror", None) or str(error)
    return text.replace(f"'{path}'", "file").replace(path, "file") or type(error).__name__
