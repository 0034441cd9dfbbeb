"""Random changes of a batch of images, for all images at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train.data.degrade import degrade


@dataclass(frozen=True)
class Augment:
    """Probabilities and largest changes; 0 everywhere leaves the images as they are."""

    flip: float = 0.0  # probability
    shift: float = 0.0  # fraction of the side
    zoom: float = 0.0  # relative
    rotation: float = 0.0  # degrees
    brightness: float = 0.0  # relative
    contrast: float = 0.0  # relative, about the image's own mean
    # Probabilities of what train/data/degrade.py does, which comes first.
    crop: float = 0.0
    low_res: float = 0.0
    photometric: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(N, 3, S, S) float in [0, 1] to the same. ``generator`` is a CPU one.

        Every image's numbers are drawn on the CPU whatever the device, and always the same
        count of them, so that a seed means the same pictures everywhere.
        """
        n = len(images)
        draws = torch.rand(7, n, generator=generator)
        chances = {"crop": self.crop, "low_res": self.low_res, "photometric": self.photometric}
        if any(chances.values()):
            images = degrade(images, generator, **chances)
        mirrored = draws[0] < self.flip
        signed = (draws[1:] * 2 - 1).to(images.device)
        dx, dy, zoom, rotation, contrast, brightness = signed
        if self.shift or self.zoom or self.rotation:
            images = self._move(images, dx, dy, zoom, rotation)
        mirrored = mirrored.to(images.device)[:, None, None, None]
        images = torch.where(mirrored, images.flip(3), images)
        if self.contrast:
            mean = images.mean((1, 2, 3), keepdim=True)
            images = mean + (images - mean) * (1 + contrast[:, None, None, None] * self.contrast)
        if self.brightness:
            images = images * (1 + brightness[:, None, None, None] * self.brightness)
        return images.clamp(0, 1)

    def _move(
        self, images: Tensor, dx: Tensor, dy: Tensor, zoom: Tensor, rotation: Tensor
    ) -> Tensor:
        """Shift, zoom and rotation about the center in one resampling; outside repeats the border.

        The four (N,) draws are in [-1, 1].
        """
        angle = rotation * math.radians(self.rotation)
        scale = 1 / (1 + zoom * self.zoom)  # the grid maps output to input
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        # Grid coordinates run over [-1, 1], so a fraction of the side counts twice.
        matrix = torch.stack(
            [cosine, -sine, 2 * self.shift * dx, sine, cosine, 2 * self.shift * dy], dim=1
        ).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float().div_(255)


def normalize(images: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]: ``(x / 255 - 0.5) / 0.5`` of the stored bytes."""
    return (images - 0.5) / 0.5
