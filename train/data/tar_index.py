"""Where the members of a tar file are, without extracting any."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

# What tarfile raises for damaged headers, besides its own errors. One long name after another makes
# it call itself.
_DAMAGE = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size: int


def read_members(path: str, wrong: list[tuple[str, str]]) -> Iterator[Member]:
    """The regular files of an uncompressed tar file, in order.

    Others than folders, names that lead elsewhere, and a file that does not end as it should, are
    added to ``wrong`` as (what, why).
    """
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                if member.offset < end or member.size < 0:
                    raise tarfile.ReadError("members overlap")
                tar.members = []  # it would keep them all
                stop = member.offset_data + member.size
                name = f"{path}, member {shown(member.name)}"
                if stop > size:
                    wrong.append((name, f"cut short: the file ends at byte {size}"))
                    return
                end = member.offset + 1
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    wrong.append((name, "refused: links, devices and the like are not data"))
                elif _leads_away(member.name):
                    wrong.append((name, "refused: its name leads out of the archive"))
                else:
                    yield Member(member.name, member.offset_data, member.size)
            rest = int(tar.offset)
        if not _ends(path, rest):
            wrong.append((path, f"damaged or cut short after byte {rest}"))
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        wrong.append((path, f"not an uncompressed tar file, or damaged: {reason}"))


def shown(name: str) -> str:
    """A member's name for a message: whatever its bytes are."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _leads_away(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or "\0" in name


def _ends(path: str, offset: int) -> bool:
    """Whether from here on there are zeros only, at least the block that ends an archive.

    tarfile takes a damaged header, and whatever follows the end, for the end.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(offset)
        marked = size - offset >= tarfile.BLOCKSIZE
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                return False
        return marked
