"""Shards: members are found and read, or named in the error."""

from __future__ import annotations

import random
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from train.data.records import RecordError
from train.data.shards import scan_shards
from train.errors import UserError

from .mutation import mutate, outcome
from .samples import jpegs, shard

_TOKENS = (
    *(b"30 path=", b"20 size=", b"GNU.sparse.major=1\n", b"hdrcharset=BINARY\n", b"././@LongLink"),
    *(b"ustar\000", b"ustar  \0", b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"7"),
    *(b"._", b"../", b"/", b".cls", b".json", b".jpg", bytes(512), bytes(1024)),
    *(b"\x80\0\0\0\0\0\0\0\0\0\0\1", b"\xff" * 12, b"77777777777\0"),
)


@cache
def _shards() -> tuple[bytes, ...]:
    images = jpegs()
    plain = [
        (f"{i}.{ending}", content)
        for i in range(3)
        for ending, content in (("jpg", images[i]), ("cls", b"%d" % i))
    ]
    json = [("a/0.png", images[3]), ("a/0.json", b'{"label": 3}'), ("a/._0.png", b"\0\5\x16\7")]
    long = [(f"{'folder/' * 20}0.jpg", images[4]), (f"{'folder/' * 20}0.cls", b"7")]
    return (
        shard(plain),
        shard(plain, kind=tarfile.USTAR_FORMAT),
        shard(json, comment="text", mtime="1.5"),
        shard(long, kind=tarfile.GNU_FORMAT),
        shard(long, kind=tarfile.PAX_FORMAT),
    )


def _checksums(damaged: bytearray, rng: random.Random) -> None:
    """Right again in most headers: without, everything is damage at the first one."""
    for at in range(0, len(damaged) - 511, 512):
        if damaged[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
            damaged[at + 148 : at + 156] = b" " * 8
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    damaged = bytearray(mutate(rng.choice(_shards()), rng, others=_shards(), tokens=_TOKENS))
    _checksums(damaged, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(damaged)

        def read() -> None:
            images = scan_shards(path, skip=rng.random() < 0.7)
            for i in range(min(len(images), 20)):
                images.name(i)
                images.read(i)

        return outcome(read, (UserError, RecordError))
