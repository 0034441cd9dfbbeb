"""The tags of a TIFF file, and of EXIF, which is one without an image.

Aldus, "TIFF Revision 6.0", 1992; BigTIFF: 64-bit counts and offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

ORIENTATION = 0x112
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES |= {16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}


@dataclass(frozen=True)
class Tag:
    number: int
    count: int  # of its values
    size: int  # bytes of these
    value: int | None  # the first, if that is an integer within the file
    entry: bytes


@dataclass(frozen=True)
class Directory:
    """The first one of a file."""

    at: int
    tags: Iterator[Tag]  # as far as the bytes go
    count: struct.Struct  # form of the number of tags, before them
    inline: int  # bytes of a value that stand in its entry; also those of an offset


def read(tiff: bytes) -> Directory | None:
    """The directory of a TIFF file; None if the bytes do not begin like one."""
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(tiff[:4])
    if order is None:
        return None
    big = b"+" in tiff[2:4]
    count, entry, inline = ("Q", "HHQQ", 8) if big else ("H", "HHII", 4)
    try:
        (at,) = struct.unpack_from(f"{order}{entry[-1]}", tiff, inline)
    except struct.error:
        return None
    number = struct.Struct(order + count)
    return Directory(
        at, _tags(tiff, order, at, number, struct.Struct(order + entry)), number, inline
    )


def _tags(
    tiff: bytes, order: str, at: int, number: struct.Struct, entry: struct.Struct
) -> Iterator[Tag]:
    (count,) = number.unpack_from(tiff, at) if at + number.size <= len(tiff) else (0,)
    start = at + number.size
    inline = (entry.size - 4) // 2  # beside number and type it has a count and a value
    for at in range(start, min(start + count * entry.size, len(tiff) - entry.size + 1), entry.size):
        tag, kind, values, offset = entry.unpack_from(tiff, at)
        size, value = values * _BYTES.get(kind, 1), None
        if kind in _CODES and values:
            with suppress(struct.error, OverflowError):
                where = offset if size > inline else at + entry.size - inline
                (value,) = struct.unpack_from(order + _CODES[kind], tiff, where)
        yield Tag(tag, values, size, value, tiff[at : at + entry.size])


def orientation(exif: bytes) -> int | None:
    """EXIF's orientation, 1 to 8; None if there is none, whatever else is wrong with it."""
    found = read(exif.removeprefix(b"Exif\0\0"))
    values = (tag.value for tag in found.tags if tag.number == ORIENTATION) if found else ()
    return next((value for value in values if value in range(1, 9)), None)
