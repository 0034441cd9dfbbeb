"""Small valid files, each format as its writers make it, for the targets of readers to mutate."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

_SIDE = 12


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (_SIDE, _SIDE + seed % 3, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def jpegs() -> tuple[bytes, ...]:
    return tuple(encode(picture(seed), "JPEG") for seed in range(8))


@cache
def images() -> tuple[bytes, ...]:
    """One of every way an image may be stored in."""
    exif = Image.Exif()
    exif[0x112] = 6
    exif[0x10F] = "maker"
    info = {"exif": exif.tobytes(), "icc_profile": b"profile" * 40}
    deep = Image.fromarray(np.arange(144, dtype=np.uint16).reshape(12, 12) * 400)
    palette = picture(2).quantize(8)
    rgba = picture(3, "RGBA")
    found = [
        encode(picture(0), "JPEG", **info, comment=b"text"),
        encode(picture(0), "JPEG", progressive=True, quality=30),
        encode(picture(1, "L"), "JPEG"),
        encode(picture(1, "CMYK"), "JPEG"),
        encode(picture(2), "PNG", **info),
        encode(rgba, "PNG"),
        encode(palette, "PNG", transparency=1),
        encode(deep, "PNG"),
        encode(picture(1, "1"), "PNG"),
        encode(rgba, "WEBP", **info),
        encode(picture(3), "WEBP", lossless=True),
        encode(palette, "GIF", comment=b"text"),
        encode(palette, "GIF", save_all=True, append_images=[palette, palette.rotate(90)]),
        encode(picture(4), "BMP"),
        encode(palette, "BMP"),
        encode(picture(4), "PPM"),
        encode(picture(1, "1"), "PPM"),
        b"P5\n12 12\n65535\n" + (np.arange(144, dtype=">u2") * 400).tobytes(),
        b"P3\n# made by hand\n2 2\n255\n" + b"1 2 3 " * 4,
        encode(deep, "TIFF"),
        encode(palette, "TIFF", compression="packbits"),
        encode(picture(1, "CMYK"), "TIFF"),
        encode(picture(1, "F"), "TIFF"),
        *(
            encode(picture(5), "TIFF", compression=kind)
            for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        encode(picture(1, "1"), "TIFF", compression="group4"),
    ]
    return tuple(found)


def shard(
    members: list[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT, **headers: Any
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = dict(headers)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()
