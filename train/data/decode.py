"""Encoded images to uint8 arrays of one size."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from train.data.image_metadata import Bare, PixelError, bare, kind_of

# Decoders inside Pillow only: some of its other formats start programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
MAX_PIXELS = 16_000_000  # the default of data.max_pixels
# Scans of the largest image; encoders write some 10. A smaller image may have more.
MOST_SCANS = 64

_TURN = Image.Transpose
# By EXIF's orientation.
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}

# Pillow warns from 89 million pixels on, below the limit that a user may set and above ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The error, if there is one, names what a damaged file lacks.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


def to_pixels(encoded: bytes, size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Any image to (3, size, size) RGB: gray is repeated, other shapes are stretched to a square.

    Downscaling is antialiased (PIL's filters widen their support with the reduction).
    """
    rgb = to_image(encoded, max_pixels)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def to_image(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any image as RGB and upright. The size in its header is checked before it is decoded.

    16-bit gray is scaled from 0 to 65535, whatever part of that it uses; floating-point and 32-bit
    gray, whose white is not known, is refused.
    """
    if not encoded:
        raise PixelError("it is empty")
    try:
        file = bare(encoded, max_pixels)
        with Image.open(io.BytesIO(file.encoded), formats=FORMATS) as image:
            _check_size(image, file.encoded, max_pixels)
            image.load()
            upright = _UPRIGHT.get(file.orientation)
            return _to_rgb(image if upright is None else image.transpose(upright), file)
    except PixelError:
        raise
    except UnidentifiedImageError as error:  # its own text is the address of the buffer
        kind = kind_of(encoded)
        reason = (
            f"{kind} is not read; convert it to JPEG or PNG" if kind else "no known image format"
        )
        raise PixelError(reason) from error
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise PixelError(str(error) or type(error).__name__) from error


def _check_size(image: Image.Image, encoded: bytes, max_pixels: int) -> None:
    pixels = image.width * image.height
    size = f"{image.width} x {image.height} pixels"
    if pixels > max_pixels:
        raise PixelError(f"it has {size}, more than data.max_pixels={max_pixels}")
    # Every scan of a progressive JPEG passes over all pixels, however few bytes it has.
    scans = encoded.count(b"\xff\xda") if image.format == "JPEG" else 1
    if scans * pixels > MOST_SCANS * max_pixels:
        raise PixelError(
            f"it has {scans} scans of {size}, more than {MOST_SCANS} of the largest image "
            f"(data.max_pixels={max_pixels})"
        )


def _to_rgb(image: Image.Image, file: Bare) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise PixelError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray: PIL would clip instead of scaling
        wide = np.asarray(image, dtype=np.float32)
        np.clip(wide * (255.0 / file.white), 0, 255, out=wide)
        if file.inverted:
            np.subtract(255.0, wide, out=wide)
        image = Image.fromarray(np.round(wide, out=wide).astype(np.uint8))
    return image.convert("RGB")
