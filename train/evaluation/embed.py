"""Features of images by a trained backbone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from train.data.augment import normalise, to_unit
from train.data.loader import ImageSource


def _flip_sum(backbone: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, S, S) to (N, D): features of the image plus those of its mirror image."""
    return backbone(images) + backbone(images.flip(3))


@torch.inference_mode()
def embed(
    backbone: nn.Module, source: ImageSource, device: torch.device, batch_size: int = 50
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Flip-summed float32 features (N, D) and labels (N,) of all images, in order."""
    training = backbone.training
    backbone.eval()
    rows = list(range(len(source.images)))
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for pixels, label in source.batches(parts):
        images = normalise(to_unit(pixels.to(device)))
        features.append(_flip_sum(backbone, images).float().cpu())
        labels.append(label)
    backbone.train(training)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()
