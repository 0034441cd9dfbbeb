"""RecordIO with its index and property: records are read, or named in the error."""

from __future__ import annotations

import random
import struct
import tempfile
from functools import cache
from pathlib import Path

from support.packs import write_recordio, write_records  # of the tests, on the path by the package

from bench.packing import pack
from train.data.recordio import scan_recordio
from train.data.records import RecordError
from train.errors import UserError

from .mutation import mutate, outcome
from .samples import jpegs

MAGIC = struct.pack("<I", 0xCED7230A)
_TOKENS = (
    *(MAGIC + struct.pack("<I", kind << 29 | size) for kind in range(5) for size in (0, 8, 24, 60)),
    *(struct.pack("<IfQQ", flag, 1.0, 0, 0) for flag in (0, 1, 2, 2**32 - 1)),
    *(struct.pack("<f", number) for number in (0.5, 1e9, 16777216.0, -1.0)),
    *(b"0\t0\n", b"1\t8\n", b"\t", b"\n"),
)
Files = dict[str, bytes]


@cache
def _sets() -> tuple[Files, ...]:
    images = jpegs()
    people = [list(images[:3]), list(images[3:5]), list(images[5:8])]
    found = []
    for layout, labels in (("header 0", 1), ("header 0", 2), ("plain", 1), ("plain", 2), ("", 0)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if layout:
                write_recordio(folder, people, layout=layout, label_count=labels)
            else:  # the magic number within images
                parts = [MAGIC * 3, b"abcd" + MAGIC, images[0]]
                write_records(folder, [(i, pack([i], part, i)) for i, part in enumerate(parts)])
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return tuple(found)


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    files = dict(rng.choice(_sets()))
    for name in rng.sample(sorted(files), rng.choice((1, 1, 2))):
        others = [other[name] for other in _sets() if name in other]
        files[name] = mutate(files[name], rng, others=others, tokens=_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)

        def read() -> None:
            images = scan_recordio(folder, skip=rng.random() < 0.7)
            for i in range(min(len(images), 20)):
                images.name(i)
                images.read(i)

        return outcome(read, (UserError, RecordError))
