"""Faces of ORL as JPEG, and packed, for the tests of ``train.data``."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image
from support.training import ROOT  # noqa: F401  # makes bench importable

from bench.packing import add_member, frame, pack, write_recordio, write_records, write_shards
from train.data.image_list import ImageList
from train.data.orl import scan_orl

__all__ = [
    "add_member",
    "contents",
    "frame",
    "pack",
    "people",
    "write_recordio",
    "write_records",
    "write_shards",
]


@cache
def people(identities: int = 5, images: int = 4, size: int = 24) -> tuple[tuple[bytes, ...], ...]:
    """The first photographs of the first people of ORL."""
    orl = scan_orl()
    chosen = []
    for who in range(identities):
        rows = np.flatnonzero(orl.labels == who)[:images]
        chosen.append(tuple(_jpeg(orl.read(int(row)), size) for row in rows))
    return tuple(chosen)


def _jpeg(encoded: bytes, size: int) -> bytes:
    file = io.BytesIO()
    image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((size, size))
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def contents(images: ImageList) -> dict[str, list[bytes]]:
    """Encoded images by identity."""
    found: dict[str, list[bytes]] = {name: [] for name in images.identities}
    for i, label in enumerate(images.labels):
        found[images.identities[label]].append(images.read(i))
    return found
