"""The bytes of an MXNet RecordIO file of images.

A record is one or more parts: a magic number, a word of 3 bits of kind and 29 bits of length, the
bytes, zeros up to a multiple of 4. Where the magic number occurs in the data at a multiple of 4,
the writer cuts there and leaves it out; the reader puts it back. Within are a header (flag, label,
id, second id), ``flag`` more labels if flag > 0, and the encoded image.

Sources: dmlc-core, src/recordio.cc; MXNet, python/mxnet/recordio.py (``IRHeader``, ``pack``).
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from train.data.records import MAX_BYTES, OpenFiles, RecordError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART = struct.Struct("<II")
HEADER = struct.Struct("<IfQQ")
WHOLE, FIRST, MIDDLE, LAST = range(4)
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1

# A record without its image: its first two labels (the second 0 if there is one only) and the size
# of its image, -1 where that takes reading the record.
HEAD = np.dtype([("label", "<f4"), ("second", "<f4"), ("image_bytes", "<i8")])
_HEADS_AT_A_TIME = 1 << 18
_THREADS = 8


def read_record(files: OpenFiles, offset: int) -> bytes:
    """Header, labels and image of the record at this byte.

    Raises:
        RecordError: with the reason only; a length is used once it is found to fit the file.
    """
    size = files.size(0)
    parts: list[bytes] = []
    total = 0
    while True:
        head = files.read(0, offset, PART.size) if 0 <= offset < size else b""
        if len(head) < PART.size:
            raise RecordError(f"byte {offset} is beyond the file's end, {size} bytes")
        magic, word = PART.unpack(head)
        kind, length = word >> LENGTH_BITS, word & LENGTH_MASK
        starts = kind in (WHOLE, FIRST)
        if magic != MAGIC or kind > LAST or starts != (not parts):
            raise RecordError(f"no record begins at byte {offset}")
        total += length + len(MAGIC_BYTES)
        if total > MAX_BYTES:
            raise RecordError(f"it has more than {MAX_BYTES} bytes")
        data = files.read(0, offset + PART.size, length)
        if len(data) < length:
            raise RecordError(f"it is cut short: the file ends at byte {size}")
        parts.append(data)
        if kind in (WHOLE, LAST):
            return MAGIC_BYTES.join(parts)
        offset += PART.size + (length + 3) // 4 * 4


def split_record(record: bytes) -> tuple[NDArray[np.float32], bytes]:
    """The labels, at least one, and the encoded image."""
    if len(record) < HEADER.size:
        raise RecordError(f"its header is cut short: {len(record)} bytes of {HEADER.size}")
    flag, label, _, _ = HEADER.unpack_from(record)
    if flag == 0:
        return np.array([label], np.float32), record[HEADER.size :]
    start = HEADER.size + 4 * flag
    if start > len(record):
        raise RecordError(f"it should have {flag} labels and is too short")
    return np.frombuffer(record, "<f4", flag, HEADER.size), record[start:]


def read_heads(files: OpenFiles, offsets: NDArray[np.int64]) -> tuple[NDArray, dict[int, str]]:
    """The ``HEAD`` of every record, and by index the reason where it cannot be read.

    For ordinary records threads read a few words of the mapped file, since each may have to wait
    for its page; any other record is read whole.
    """
    heads = np.zeros(len(offsets), HEAD)
    heads["image_bytes"] = -1
    size = files.size(0)
    if size >= 4:
        words = np.asarray(np.memmap(files.paths[0], "<u4", mode="r", shape=(size // 4,)))
        starts = range(0, len(offsets), _HEADS_AT_A_TIME)
        parts = [slice(start, start + _HEADS_AT_A_TIME) for start in starts]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda p: _ordinary(words, size, offsets[p], heads[p]), parts))
    errors: dict[int, str] = {}
    before = files.bytes_read
    for i in np.flatnonzero(heads["image_bytes"] < 0).tolist():
        if files.bytes_read - before > 2 * size:  # or a small file could keep this busy for hours
            errors[i] = "it shares its bytes with other records"
            continue
        try:
            labels, image = split_record(read_record(files, int(offsets[i])))
            heads[i] = (labels[0], labels[1] if len(labels) > 1 else 0, len(image))
        except RecordError as error:
            errors[i] = str(error)
    return heads, errors


def _ordinary(words: NDArray, size: int, offsets: NDArray[np.int64], heads: NDArray) -> None:
    """Fills in the heads of whole records that lie within the file."""
    smallest = PART.size + HEADER.size
    good = (offsets >= 0) & (offsets % 4 == 0) & (offsets <= size - smallest)
    rows = np.flatnonzero(good)
    at = offsets[rows] // 4
    length = (words[at + 1] & LENGTH_MASK).astype(np.int64)
    flag = words[at + 2].astype(np.int64)
    image = length - HEADER.size - 4 * flag
    good = (words[at] == MAGIC) & (words[at + 1] >> LENGTH_BITS == WHOLE)
    good &= (image >= 0) & (offsets[rows] + PART.size + length <= size)
    rows, at, flag, image = rows[good], at[good], flag[good], image[good]
    # The header's own label, or the first of those after it.
    heads["label"][rows] = words[at + np.where(flag == 0, 3, 8)].view("<f4")
    several = flag > 1
    heads["second"][rows[several]] = words[at[several] + 9].view("<f4")
    heads["image_bytes"][rows] = image
