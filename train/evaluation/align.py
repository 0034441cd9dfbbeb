"""Faces aligned by five landmarks: eyes, nose and corners of the mouth at fixed places.

The places are those of insightface (``arcface_src``; recognition/_evaluation_/ijb), the fit is
Umeyama's: the similarity transform with the least squared distances.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.data.decode import PixelError, to_image
from train.data.records import Files, RecordError
from train.errors import reported

SIDE = 112
# x, y of landmarks in the aligned image; the center of the first pixel is (0, 0).
PLACES = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, 3) matrix [A | b] of the rotation, scale and shift that take source (n, 2) to target.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns",
    IEEE PAMI 1991, equations (40) to (42).
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    x, y = source - source_mean, target - target_mean
    left, values, right = np.linalg.svd(y.T @ x / len(x))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # no reflection
    scale = (values * signs).sum() / np.square(x).sum(1).mean()
    matrix = scale * (left * signs) @ right
    return np.column_stack([matrix, target_mean - matrix @ source_mean])


def align(image: Image.Image, landmarks: NDArray[np.float64]) -> Image.Image:
    """(5, 2) landmarks of an RGB image at their places, in SIDE x SIDE pixels; black beyond it."""
    back = similarity(PLACES, landmarks)
    # Landmarks are in pixels whose centers are whole numbers; PIL puts them at halves.
    shift = back[:, 2] + 0.5 - back[:, :2] @ np.array([0.5, 0.5])
    coefficients = np.column_stack([back[:, :2], shift]).ravel().tolist()
    # In floats: PIL cuts the decimals of bytes off, which darkens by half a gray level.
    bands = [
        band.convert("F").transform(
            (SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
        for band in image.split()
    ]
    pixels = np.stack([np.asarray(band) for band in bands], axis=2)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class AlignedFaces:
    """Records of aligned faces, uncompressed, out of files of larger images."""

    paths: Sequence[str]
    landmarks: NDArray[np.float64]  # (N, 5, 2)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        with reported(f"cannot read image {self.paths[index]}", PixelError, error=RecordError):
            image = to_image(Files(self.paths).read(index))
        encoded = io.BytesIO()
        align(image, self.landmarks[index]).save(encoded, "PPM")
        return encoded.getvalue()

    def name(self, index: int) -> str:
        return self.paths[index]
