"""Identities and images that are both in training and in a test set, whose metrics mean less."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from train.data.image_list import ImageList
from train.data.records import RecordError
from train.errors import UserError

# Comparing images reads all of them: a few seconds for this many, minutes for millions.
MOST_IMAGES = 50_000
_EXAMPLES = 3


def check_duplicates(mode: str, train: ImageList, tests: Sequence[ImageList]) -> str | None:
    """A warning in one line, by ``data.duplicates``; None without duplicates.

    Raises:
        UserError: the same line, where ``mode`` is ``fail``.
    """
    if mode == "ignore":
        return None
    found = report_duplicates(train, tests, images=mode == "fail" or len(train) <= MOST_IMAGES)
    if found and mode == "fail":
        raise UserError(f"{found} (data.duplicates=report goes on)")
    return found


def report_duplicates(
    train: ImageList, tests: Sequence[ImageList], *, images: bool = True
) -> str | None:
    """Numbers of identities, by name, and of images, by their bytes, that are in both; examples.

    Names are compared where both sides have any: numbers of records and shards count from 0 in
    every set. An image that was encoded anew is another one.
    """
    names = _shared_names(train, tests)
    pictures = _shared_images(train, tests) if images else []
    parts = [
        f"{what}: {len(shared)} ({', '.join(shared[:_EXAMPLES])}"
        f"{', ...' if len(shared) > _EXAMPLES else ''})"
        for what, shared in (("identities by name", names), ("identical images", pictures))
        if shared
    ]
    return f"both in training and in a test set: {'; '.join(parts)}" if parts else None


def _shared_names(train: ImageList, tests: Sequence[ImageList]) -> list[str]:
    if not train.named:
        return []
    known = set(train.identities)
    tested = (name for test in tests if test.named for name in test.identities)
    return list(dict.fromkeys(name for name in tested if name in known))


def _shared_images(train: ImageList, tests: Sequence[ImageList]) -> list[str]:
    """Pairs of equal images as ``name in the test set = name in the training set``."""
    tested: dict[bytes, tuple[ImageList, int]] = {}
    for test in tests:
        for i in range(len(test)):
            if (digest := _digest(test, i)) is not None:
                tested[digest] = (test, i)
    shared = []
    for i in range(len(train) if tested else 0):
        digest = _digest(train, i)
        if digest in tested:
            test, k = tested[digest]
            shared.append(f"{test.name(k)} = {train.name(i)}")
    return shared


def _digest(images: ImageList, index: int) -> bytes | None:
    """Digest of an image; None if it cannot be read, which is reported where it is used."""
    try:
        encoded = images.read(index)
    except RecordError:
        return None
    return hashlib.blake2b(encoded, digest_size=16).digest() if encoded else None
