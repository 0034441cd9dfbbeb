"""Features of images by a trained backbone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from train.data.augment import normalize, to_unit
from train.data.loader import ImageSource
from train.distributed import DistributedEnv
from train.stopping import StoppedError, requested

# The rounding of features depends on it, so training and the commands have the same one.
BATCH_SIZE = 50


def _flip_sum(backbone: nn.Module, images: Tensor, flip: bool) -> Tensor:
    """(N, 3, S, S) to (N, D): features of the image, with ``flip`` plus its mirror image's."""
    return backbone(images) + backbone(images.flip(3)) if flip else backbone(images)


@torch.inference_mode()
def embed(
    backbone: nn.Module,
    source: ImageSource,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    world: DistributedEnv | None = None,
    flip: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Flip-summed float32 features (N, D) and labels (N,) of all images, in order.

    Without ``flip``, features of the images alone.

    Every process of ``world`` calls, embeds its share of the images, and gets those of all, and
    what others have skipped.

    Raises:
        StoppedError: on all processes, where one of them has received a signal to stop.
    """
    world = world or DistributedEnv(0, 1, device)
    # Module by module: some may be in evaluation mode while the rest is trained.
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    share = np.array_split(np.arange(len(source.images)), world.size)[world.rank].tolist()
    parts = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for pixels, label in source.batches(parts):
        if requested():
            break
        images = normalize(to_unit(pixels.to(device)))
        features.append(_flip_sum(backbone, images, flip).float().cpu())
        labels.append(label)
    for module in training:
        module.training = True
    own = (torch.cat(features), torch.cat(labels)) if features else None
    every = world.gather_objects((source.skipped, requested(), own))
    for skipped, _, _ in every:
        source.skipped.update(skipped)
    if stop := max(stop for _, stop, _ in every):
        raise StoppedError(stop)
    columns = zip(*(part for _, _, part in every if part), strict=True)
    found, found_labels = (torch.cat(column).numpy() for column in columns)
    return found, found_labels
