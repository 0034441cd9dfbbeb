"""Verification sets: pickles of pairs, read without running them."""

from __future__ import annotations

import pickle
import random
import struct
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from support.evaluation_formats import array_bin, python2_bin, python2_text_bin  # of the tests

from train.config import make_config
from train.errors import UserError
from train.evaluation.test_sets import open_bin_set

from .mutation import mutate, outcome
from .samples import jpegs

_CONFIG = make_config(
    ("fuzz", {"model": {"input_size": 16}, "data": {"on_error": "skip", "workers": 0}})
)
_TOKENS = (
    *(bytes([code]) for code in b"(.0123FIJKLMNRSTUVXabcdeghijlopqrstu}]\x80\x81\x82\x85\x86\x87"),
    *(
        b"\x8a\xff" + bytes(255),
        b"\x8b\xff\xff\xff\x7f",
        b"\x94" * 50,
        b"\x93",
        b"\x95" + b"\xff" * 8,
    ),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\ndtype\n", b"cposix\nsystem\n"),
    *(b"c_codecs\nencode\n", b"(lp0\n", b"g0\n", b"h\0h\0", b"r\xff\xff\xff\x7f", b"I01\n"),
    *(b"X" + struct.pack("<I", size) for size in (0, 3, 2**31, 2**32 - 1)),
)


@cache
def _sets() -> tuple[bytes, ...]:
    images = [jpegs()[i % 8] for i in range(24)]
    same = [p % 2 == 0 for p in range(12)]
    flags = np.array(same)
    return (
        python2_bin(images, same),
        python2_text_bin(images, same),
        *(pickle.dumps((images, same), protocol) for protocol in (0, 2, 4, 5)),
        *(array_bin(images, same, protocol) for protocol in (0, 2, 4, 5)),
        *(pickle.dumps((images, flags), protocol) for protocol in (2, 5)),
    )


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    damaged = mutate(rng.choice(_sets()), rng, others=_sets(), tokens=_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lfw.bin"
        path.write_bytes(damaged)

        def read() -> None:
            images = open_bin_set(path, _CONFIG).source.images
            assert all(isinstance(images.read(i), bytes) for i in range(min(len(images), 20)))

        return outcome(read, (UserError,))
