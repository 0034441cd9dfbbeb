"""Fashion-MNIST: gray photographs of ten kinds of clothing, 28 x 28 pixels.

Credit: Zalando SE. The images come out of Debian's package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.image_list import ImageList, whole
from train.data.records import Encoded
from train.errors import UserError, reported

CREDIT = (
    "Fashion-MNIST is by Zalando SE, under the MIT license: H. Xiao, K. Rasul and R. Vollgraf, "
    '"Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", '
    "arXiv 1708.07747, 2017."
)
HOLDOUT = 4  # shirt, sneaker, bag and ankle boot
IMAGES = 500  # the first ones of the test set, about fifty of a kind
KINDS = [
    *("t-shirt", "trouser", "pullover", "dress", "coat", "sandal"),
    *("shirt", "sneaker", "bag", "ankle-boot"),
]
SIDE = 28
# Unpacked into the environment by `make losses`, or installed.
ROOTS = (Path(sys.prefix) / "fashion-mnist", Path("/"))
FILES = Path("usr/share/datasets/fashion-mnist")


def fashion_mnist_folder() -> Path:
    for root in ROOTS:
        if (root / FILES).is_dir():
            return root / FILES
    raise UserError(
        "Fashion-MNIST comes with Debian's package dataset-fashion-mnist, not found here: "
        f"apt-get install dataset-fashion-mnist, or unpack it to {ROOTS[0]}"
    )


def scan_fashion_mnist() -> ImageList:
    """The first :data:`IMAGES` images."""
    folder = fashion_mnist_folder()
    path = folder / "t10k-images-idx3-ubyte.gz"
    pixels = _read(path, 16).reshape(-1, SIDE * SIDE)[:IMAGES]
    labels = _read(folder / "t10k-labels-idx1-ubyte.gz", 8)[:IMAGES].astype(np.int64)
    header = f"P5 {SIDE} {SIDE} 255\n".encode()
    return whole(Encoded([header + row.tobytes() for row in pixels], str(path)), labels, KINDS)


def _read(path: Path, header: int) -> NDArray[np.uint8]:
    """The numbers of an IDX file of bytes."""
    with reported(f"cannot read {path}", OSError, ValueError), gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)
