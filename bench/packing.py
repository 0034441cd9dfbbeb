"""Images packed as training sets are published: insightface's RecordIO, and shards."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAGIC = struct.pack("<I", 0xCED7230A)
# The encoded images of each identity in order.
People = Sequence[Sequence[bytes]]


def pack(labels: Sequence[float], image: bytes, key: int) -> bytes:
    """Header, labels and image; one label is part of the header."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], key, 0) + image
    header = struct.pack("<IfQQ", len(labels), 0.0, key, 0)
    return header + np.asarray(labels, "<f4").tobytes() + image


def frame(record: bytes) -> bytes:
    """The record, split where the magic number lies at a multiple of 4."""
    cuts = [i for i in range(0, len(record) // 4 * 4, 4) if record[i : i + 4] == MAGIC]
    starts, ends = [0, *(c + 4 for c in cuts)], [*cuts, len(record)]
    framed = b""
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kind = 0 if not cuts else 1 if i == 0 else 3 if i == len(cuts) else 2
        part = record[start:end]
        framed += MAGIC + struct.pack("<I", kind << 29 | len(part)) + part
        framed += bytes(-len(part) % 4)
    return framed


def write_records(folder: Path, records: Sequence[tuple[int, bytes]]) -> Path:
    """``train.rec`` and ``train.idx`` of (key, record)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.rec", "wb") as rec, open(folder / "train.idx", "w") as index:
        for key, record in records:
            index.write(f"{key}\t{rec.tell()}\n")
            rec.write(frame(record))
    return folder


def write_recordio(
    folder: Path, people: People, *, layout: str = "header 0", label_count: int = 2
) -> Path:
    """``header 0``: images from record 1 on, then identities; ``plain``: images from 0 on."""
    records: list[tuple[int, bytes]] = []
    ranges: list[tuple[int, int]] = []
    key = first = 1 if layout == "header 0" else 0
    for label, images in enumerate(people):
        begin = key
        for image in images:
            records.append((key, pack([label, 1][:label_count], image, key)))
            key += 1
        ranges.append((begin, key))
    if first:
        # Like face2rec2: record 0, with the counts, is written after the images.
        records.append((0, pack([key, key + len(ranges)], b"", 0)))
        records += [(key + i, pack(ends, b"", key + i)) for i, ends in enumerate(ranges)]
    write_records(folder, records)
    (folder / "property").write_text(f"{len(people)},112,112")
    return folder


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(
    folder: Path, people: People, *, per_shard: int = 16, label: str = "cls", suffix: str = "jpg"
) -> Path:
    """``faces-000000.tar`` and so on; identities are interleaved, as in shuffled shards."""
    folder.mkdir(parents=True, exist_ok=True)
    most = max(len(images) for images in people)
    samples = [
        (identity, images[k])
        for k in range(most)
        for identity, images in enumerate(people)
        if k < len(images)
    ]
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        with tarfile.open(folder / f"faces-{shard:06d}.tar", "w") as tar:
            for i, (identity, image) in enumerate(samples[start : start + per_shard], start):
                add_member(tar, f"{i:08d}.{suffix}", image)
                content = str(identity) if label == "cls" else json.dumps({"label": identity})
                add_member(tar, f"{i:08d}.{label}", content.encode())
    return folder
