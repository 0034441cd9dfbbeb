"""What no training, or a linear model, makes of the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

Floats = NDArray[np.floating[Any]]
PCA_COMPONENTS = 100


def gray_vectors(pixels: NDArray[np.uint8]) -> Floats:
    """(N, 3, S, S) to the (N, S * S) mean of the channels."""
    return pixels.astype(np.float64).mean(1).reshape(len(pixels), -1)


def raw_pixels(train: Floats, test: Floats) -> Floats:
    """Test images minus the mean training image: without that every cosine is close to 1."""
    return test - train.mean(0)


def pca(train: Floats, test: Floats, components: int = PCA_COMPONENTS) -> Floats:
    """Eigenfaces: coordinates of the test images on the training images' principal axes."""
    components = min(components, *train.shape)
    model = PCA(components, svd_solver="full").fit(train)
    return np.asarray(model.transform(test))
