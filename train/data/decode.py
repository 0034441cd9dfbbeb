"""Encoded images to uint8 arrays of one size."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# Decoders inside Pillow only: some of its other formats start programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
MAX_PIXELS = 16_000_000  # where the configuration says nothing

# Pillow warns from 89 million pixels on, below the limit that a user may set and above ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImageError(Exception):
    """The message names the image."""


class PixelError(Exception):
    """The reason why an image cannot be read."""


def decode(encoded: bytes, size: int, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """:func:`to_pixels`, with an error that names the image."""
    try:
        return to_pixels(encoded, size, max_pixels)
    except PixelError as error:
        raise UnreadableImageError(f"cannot read image {name}: {error}") from error


def to_pixels(encoded: bytes, size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Any image to (3, size, size) RGB: grey is repeated, other shapes are stretched to a square.

    Downscaling is antialiased (PIL's filters widen their support with the reduction).
    """
    rgb = to_image(encoded, max_pixels)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def to_image(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any image as RGB and upright. The size in its header is checked before it is decoded."""
    if not encoded:
        raise PixelError("it is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PixelError(
                    f"it has {image.width} x {image.height} pixels, more than "
                    f"data.max_pixels={max_pixels}"
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except PixelError:
        raise
    except UnidentifiedImageError as error:  # its own text is the address of the buffer
        raise PixelError("no known image format") from error
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise PixelError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip instead of scaling
        wide = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((wide / 257.0).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")
