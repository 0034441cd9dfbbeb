"""The identities of a set of images, on which processes and resumed runs must agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.image_list import ImageList
from train.distributed import DistributedEnv
from train.errors import UserError


@dataclass(frozen=True)
class Identities:
    """Names in the order of their labels, and the images of each."""

    names: Sequence[str]
    counts: NDArray[np.int64]  # (identities,)
    labels: bytes = b""  # digest of the labels of all images, in order; empty: not compared

    @classmethod
    def of(cls, images: ImageList, *, in_order: bool = False) -> Identities:
        """``in_order``: include a digest of all labels in order, which takes a pass over them."""
        counts = np.bincount(images.labels, minlength=len(images.identities)).astype(np.int64)
        labels = b""
        if in_order:
            labels = hashlib.blake2b(np.ascontiguousarray(images.labels), digest_size=16).digest()
        return cls(images.identities, counts, labels)

    def digest(self) -> bytes:
        found = hashlib.blake2b(self.labels, digest_size=16)
        found.update("\0".join(self.names).encode(errors="surrogatepass"))
        found.update(np.ascontiguousarray(self.counts))
        return found.digest()

    def difference(self, other: Identities) -> str:
        """The first difference, the other's in brackets; empty without any."""
        for number, (ours, theirs) in enumerate(zip_longest(self.names, other.names)):
            if ours != theirs:
                named = [f"'{name}'" if name is not None else "none" for name in (ours, theirs)]
                return (
                    f"{len(self.names)} identities ({len(other.names)}), of which number {number} "
                    f"is {named[0]} ({named[1]})"
                )
        different = np.flatnonzero(self.counts != other.counts)
        if len(different):
            k = different[0]
            return (
                f"{self.counts.sum()} images ({other.counts.sum()}), {self.counts[k]} of "
                f"'{self.names[k]}' ({other.counts[k]})"
            )
        if self.labels and other.labels and self.labels != other.labels:
            return "the same identities, with their images in another order"
        return ""


def check_same(world: DistributedEnv, what: str, images: ImageList) -> None:
    """An error on all processes that names the first difference; every process calls."""
    if world.size == 1:
        return
    own = Identities.of(images, in_order=True)
    digests = world.gather_objects(own.digest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        first = world.from_main(lambda: own)
        said = world.gather_objects(first.difference(own))[others[0]]
        raise UserError(
            f"{what} is not the same on all processes: process 0 has, and in brackets process "
            f"{others[0]}, {said}"
        )


# -- names in checkpoints --------------------------------------------------------------------------


def pack_names(names: Sequence[str]) -> str:
    """Names of folders hold no zeros. Two million strings would take 10 s to load, one none."""
    return "\0".join(names)


def unpack_names(held: str | list[str]) -> list[str]:
    """Earlier checkpoints hold a list."""
    return held.split("\0") if isinstance(held, str) else held


def check_names(held: str | list[str], names: Sequence[str], path: Path) -> None:
    """An error unless the identities are those a checkpoint holds."""
    held = unpack_names(held)
    wrong = next((i for i, (a, b) in enumerate(zip_longest(held, names)) if a != b), None)
    if wrong is None:
        return
    shown = [repr(given[wrong]) if wrong < len(given) else "none" for given in (held, names)]
    raise UserError(
        f"{path} was trained on other identities ({len(held)}) than those of data.path "
        f"({len(names)}); of number {wrong} the names are {shown[0]} and {shown[1]}"
    )
