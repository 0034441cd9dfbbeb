"""Encoded images: pixels of the requested size, or the reason why there are none."""

from __future__ import annotations

import random
import struct

import numpy as np

from train.data.decode import PixelError, to_pixels

from .mutation import mutate, outcome
from .samples import images

_TOKENS = (
    *(
        b"\xff\xda",
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xc2",
        b"\xff\xe1\0\x10Exif\0\0",
        b"\xff\xdd\0\4",
    ),
    *(b"IHDR", b"IDAT", b"\0\0\0\0IDAT", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"tRNS", b"PLTE"),
    *(b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"ALPH", b"EXIF", b"XMP "),
    *(b"\x21\xfe\1x\0", b"\x21\xf9\4\0\0\0\0\0", b"\x2c", b"\x3b"),
    *(struct.pack("<HHII", tag, kind, 1, 0) for tag in (0x111, 0x117, 0x144) for kind in (3, 4)),
    *(b"#\n", b"P1\n", b"P6\n", b"\0\2\xff\xff", b"II*\0", b"MM\0*", b"II+\0"),
)


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    others = images()
    damaged = mutate(rng.choice(others), rng, others=others, tokens=_TOKENS)

    def decode() -> None:
        pixels = to_pixels(damaged, 16)
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == np.uint8

    return outcome(decode, (PixelError,))
