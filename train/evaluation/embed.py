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
    if not flip:
        return backbone(images)
    return backbone(images) + backbone(images.flip(3))


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
    rows = np.array_split(np.arange(len(source.images)), world.size)[world.rank].tolist()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
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
    stops = []
    for skipped, stop in world.gather_objects((source.skipped, requested())):
        source.skipped.update(skipped)
        stops.append(stop)
    if any(stops):
        raise StoppedError(max(stops))
    if world.size == 1:
        return torch.cat(features).numpy(), torch.cat(labels).numpy()
    return _gather_rows(features, world).numpy(), _gather_rows(labels, world).numpy()


def _gather_rows(parts: list[Tensor], world: DistributedEnv) -> Tensor:
    """The rows of all processes in order; a process without any need not know their shape."""
    own = torch.cat(parts) if parts else torch.empty(0)
    shape = [len(own), *own.shape[1:]] if parts else [0]
    shapes = world.gather_objects((shape, own.dtype))
    longest, dtype = max(shapes, key=lambda given: given[0][0])
    padded = torch.zeros(longest, dtype=dtype)
    if parts:
        padded[: len(own)] = own
    found = world.gather(padded.to(world.device))
    return torch.cat([rows[: given[0][0]].cpu() for rows, given in zip(found, shapes, strict=True)])
