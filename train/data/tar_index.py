"""Offsets of the members of a tar file, without extracting any.

The standard library reads the headers' blocks. Their order, and the extended headers between them,
are read here: its way of doing so takes time that grows with the square of an extended header, and
calls itself for each.

Sources: POSIX.1-2001, pax; GNU tar, "Basic Tar Format".
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from tarfile import BLOCKSIZE, TarInfo
from typing import BinaryIO

from train.errors import printable as shown

_CHUNK = 1 << 20
# Bytes of an extended header, and of names: file systems allow 4096.
_MOST_EXTENDED = 1 << 20
_MOST_NAME = 4096


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size: int


class _DamageError(Exception):
    """A reason."""


def read_members(path: str, wrong: list[tuple[str, str]]) -> Iterator[Member]:
    """The regular files of an uncompressed tar file, in order, but for hidden ones.

    Others than folders, names that lead elsewhere, and a file that does not end as it should, are
    added to ``wrong`` as (what, why).
    """
    try:
        with open(path, "rb") as file:
            yield from _members(file, path, wrong)
    except (OSError, _DamageError) as error:
        wrong.append((path, f"not an uncompressed tar file, or damaged: {error}"))


def _members(file: BinaryIO, path: str, wrong: list[tuple[str, str]]) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    at = 0
    extended: dict[str, str] = {}
    while True:
        file.seek(at)
        block = file.read(BLOCKSIZE)
        try:
            member = TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not at:
                raise _DamageError(str(error) if block else "it is empty") from error
            break  # the end, or what has to be one
        data = at + BLOCKSIZE
        if member.type in (*_LONG_NAMES, *_PAX):
            if not 0 <= member.size <= min(_MOST_EXTENDED, size - data):
                raise _DamageError(f"an extended header of {member.size} bytes at byte {at}")
            content = file.read(member.size)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(content.split(b"\0", 1)[0])
            elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= _records(content)
            at = _after(data, member.size)
            continue
        name, written = extended.get("path", member.name), extended.get("size", str(member.size))
        if not re.fullmatch("-?[0-9]{1,19}", written):
            raise _DamageError(f"a size of {written[:20]!r}")
        length = int(written)
        sparse = any(key.startswith("GNU.sparse.") for key in extended)
        extended = {}
        if member.type == tarfile.GNUTYPE_SPARSE:
            sparse, more = True, block[482:483].strip(b"\0")
            while more and (block := file.read(BLOCKSIZE)):
                data, more = data + BLOCKSIZE, block[504:505].strip(b"\0")
        where = f"{path}, member {shown(name)}"
        if not member.isreg() and member.type in tarfile.SUPPORTED_TYPES:
            length = 0  # links, folders and devices have no data
        if length < 0:
            raise _DamageError(f"a member of {length} bytes at byte {at}")
        if data + length > size:
            wrong.append((where, f"cut short: the file ends at byte {size}"))
            return
        at = _after(data, length)
        if member.isdir() or _hidden(name):
            continue
        if not member.isreg() or sparse:
            wrong.append((where, "refused: links, devices and the like are not data"))
        elif len(name) > _MOST_NAME:
            wrong.append((where, f"refused: its name has {len(name)} characters"))
        elif name.startswith(("/", "\\")) or "\0" in name or ".." in re.split(r"[/\\]", name):
            wrong.append((where, "refused: its name leads out of the archive"))
        else:
            yield Member(name, data, length)
    if extended:
        raise _DamageError(f"an extended header without a member before byte {at}")
    if not _ends(file, at, size):
        wrong.append((path, f"damaged or cut short after byte {at}"))


_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _after(data: int, length: int) -> int:
    return data + -(-length // BLOCKSIZE) * BLOCKSIZE


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _records(content: bytes) -> dict[str, str]:
    """``"<length> <key>=<value>\\n"``, the length being that of all of it."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length > len(content) or not record.endswith(b"\n") or not equals:
            raise _DamageError("an extended header that is none")
        found[_text(key)] = _text(value[:-1])
        at += length
    return found


def _hidden(name: str) -> bool:
    """Whether a name is hidden, as macOS's '._x.jpg' (attributes of x.jpg) and '__MACOSX' are."""
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part.strip(".") for part in parts)


def _ends(file: BinaryIO, offset: int, size: int) -> bool:
    """True if from here on there are zeros only, at least the block that ends an archive.

    A damaged header, and whatever follows the end, would be taken for the end.
    """
    file.seek(offset)
    marked = size - offset >= BLOCKSIZE
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            return False
    return marked
