"""Sets of images that ``data.path`` has a name for; both come with packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.data import fashion_mnist, orl
from train.data.image_list import ImageList


@dataclass(frozen=True)
class NamedSet:
    scan: Callable[[], ImageList]
    holdout: int  # identities of the test, where data.holdout is null
    credit: str


NAMED = {
    "orl": NamedSet(orl.scan_orl, orl.HOLDOUT, orl.CREDIT),
    "fashion_mnist": NamedSet(
        fashion_mnist.scan_fashion_mnist, fashion_mnist.HOLDOUT, fashion_mnist.CREDIT
    ),
}


def holdout_of(path: str, holdout: int | None) -> int:
    """``data.holdout``, or what stands for null."""
    if holdout is not None:
        return holdout
    return NAMED[path].holdout if path in NAMED else 0
