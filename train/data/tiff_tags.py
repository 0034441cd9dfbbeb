"""The tags of a TIFF file, and of EXIF, which is one without an image.

Aldus, "TIFF Revision 6.0", 1992; BigTIFF: 64-bit counts and offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

ORIENTATION = 0x112
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES |= {16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}


@dataclass(frozen=True)
class Layout:
    """Position of the first directory; ``order`` is a byte order of ``struct``."""

    order: str
    at: int
    count: struct.Struct
    entry: struct.Struct
    inline: int  # bytes of a value that stand in its entry; also those of an offset


@dataclass(frozen=True)
class Tag:
    number: int
    kind: int
    count: int
    at: int  # of its entry
    data_at: int

    @property
    def size(self) -> int:
        return self.count * _BYTES.get(self.kind, 1)

    def integer(self, tiff: bytes, order: str) -> int | None:
        """The first value, if that is an integer within the file."""
        code = _CODES.get(self.kind)
        if code is None or self.count < 1:
            return None
        try:
            return int(struct.unpack_from(order + code, tiff, self.data_at)[0])
        except struct.error:
            return None


def layout(tiff: bytes) -> Layout | None:
    """Byte order and form of a TIFF file; None if the bytes do not begin like one."""
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(tiff[:4])
    if order is None:
        return None
    big = b"+" in tiff[2:4]
    count, entry, inline = ("Q", "HHQQ", 8) if big else ("H", "HHII", 4)
    try:
        (at,) = struct.unpack_from(f"{order}{entry[-1]}", tiff, inline)
    except struct.error:
        return None
    return Layout(order, at, struct.Struct(order + count), struct.Struct(order + entry), inline)


def tags(tiff: bytes, where: Layout) -> Iterator[Tag]:
    """The entries of the first directory, as far as the bytes go."""
    size = where.entry.size
    if where.at + where.count.size > len(tiff):
        return
    (count,) = where.count.unpack_from(tiff, where.at)
    start = where.at + where.count.size
    for at in range(start, min(start + count * size, len(tiff) - size + 1), size):
        number, kind, values, offset = where.entry.unpack_from(tiff, at)
        outside = values * _BYTES.get(kind, 1) > where.inline
        yield Tag(number, kind, values, at, offset if outside else at + size - where.inline)


def orientation(exif: bytes) -> int | None:
    """EXIF's orientation, 1 to 8; None if there is none, whatever else is wrong with it."""
    exif = exif.removeprefix(b"Exif\0\0")
    where = layout(exif)
    found = (t for t in tags(exif, where) if t.number == ORIENTATION) if where else ()
    values = (tag.integer(exif, where.order) for tag in found if where)
    return next((value for value in values if value is not None and 1 <= value <= 8), None)
