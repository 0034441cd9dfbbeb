"""Random crops, low resolution and photometric changes of some images of a batch.

Distributions: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, in
mk-minchul/AdaFace, dataset/augmenter.py. Values between two resamplings are clamped as there, but
not rounded to bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CROP_AREA = (0.2, 1.0)  # of the image's
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
LOWEST_RESOLUTION = 0.2
PHOTOMETRIC = 0.5  # brightness, contrast and saturation are multiplied by 1 - 0.5 to 1 + 0.5
LUMA = (0.299, 0.587, 0.114)
KERNELS = 5


def degrade(
    images: Tensor, generator: torch.Generator, *, crop: float, low_res: float, photometric: float
) -> Tensor:
    """(N, 3, S, S) in [0, 1] to the same; each change is made with its probability, in this order.

    All numbers are drawn on the CPU, always the same count of them, and images are chosen there:
    nothing waits for the device.
    """
    n = len(images)
    changes: tuple[tuple[float, int, Callable[[Tensor, Tensor], Tensor]], ...] = (
        (crop, 2 * CROP_ATTEMPTS + 2, cropped),
        (low_res, 3, low_resolution),
        (photometric, 6, photometrically_changed),
    )
    for probability, count, change in changes:
        chance, draws = torch.rand(1 + count, n, generator=generator).split([1, count])
        chosen = (chance[0] < probability).nonzero()[:, 0]
        if len(chosen):
            place = chosen.to(images.device, non_blocking=True)
            result = change(images.index_select(0, place), draws[:, chosen])
            images = images.index_copy(0, place, result)
    return images


def cropped(images: Tensor, draws: Tensor) -> Tensor:
    """Black outside of a random rectangle, which stays where it is.

    ``draws``: (22, n) in [0, 1): areas and ratios of ten attempts, of which the first that fits
    counts (all of the image if none does), and the place.
    """
    side, count = images.shape[-1], CROP_ATTEMPTS
    area = (CROP_AREA[0] + draws[:count] * (CROP_AREA[1] - CROP_AREA[0])) * side**2
    low, high = torch.tensor(CROP_RATIO).log()
    ratio = (low + draws[count : 2 * count] * (high - low)).exp()
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).round()  # (2, 10, n)
    fits = (sizes <= side).all(0)
    first = fits.int().argmax(0)
    size = sizes.gather(1, first.expand(2, 1, -1))[:, 0]
    size = torch.where(fits.any(0), size, side)
    start = (draws[2 * count :] * (side - size + 1)).floor()
    start, end = torch.stack([start, start + size]).to(images.device, non_blocking=True)[..., None]
    at = torch.arange(side, device=images.device)
    columns, rows = (at >= start) & (at < end)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def low_resolution(images: Tensor, draws: Tensor) -> Tensor:
    """Smaller, by up to a factor of five, and back; both by one of five kernels at random.

    ``draws``: (3, n) in [0, 1): the size, and the two kernels.
    """
    side = images.shape[-1]
    ratio = LOWEST_RESOLUTION + draws[0] * (1 - LOWEST_RESOLUTION)
    small = (ratio * side).long().clamp(min=1)
    whole = torch.full_like(small, side)
    down, up = (draws[1:] * KERNELS).long()
    passes = torch.stack([torch.stack(p) for p in ((down, whole, small), (up, small, whole))])
    for kernel, before, after in passes.to(images.device, non_blocking=True):
        matrix = resampling(kernel, before, after, side)[:, None]
        images = (matrix @ images @ matrix.mT).clamp(0, 1)
    return images


def resampling(kernel: Tensor, before: Tensor, after: Tensor, side: int) -> Tensor:
    """(n, side, side) matrices that resample ``before`` pixels to ``after``, both (n,) at most
    ``side``, as OpenCV does: without smoothing, the border repeated. Rows and columns beyond are 0.

    ``kernel``: 0 to 4 for nearest, linear, area, cubic and Lanczos of four lobes.
    """
    reach, device = 4, kernel.device
    taps = torch.arange(-reach, side + reach, device=device)
    out = torch.arange(side, device=device)[:, None]
    size, wanted = before[:, None, None], after[:, None, None]
    scale = size / wanted
    distance = ((out + 0.5) * scale - 0.5 - taps).abs()
    near = (taps == out * size // wanted).float()
    linear = (1 - distance).clamp(min=0)
    overlap = torch.minimum((out + 1) * scale, taps + 1) - torch.maximum(out * scale, taps)
    area = overlap.clamp(min=0)
    inner = (1.25 * distance - 2.25) * distance**2 + 1
    outer = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    cubic = torch.where(distance <= 1, inner, torch.where(distance < 2, outer, 0))
    lobes = torch.where(distance < 4, distance.sinc() * (distance / 4).sinc(), 0)
    every = torch.stack([near, linear, area, cubic, lobes])
    chosen = every[kernel, torch.arange(len(kernel), device=device)]
    # Taps beyond the border count for the pixel there; matmul adds them in one order.
    clamped = torch.minimum(taps.clamp(min=0), size - 1)  # (n, 1, taps)
    border = (clamped.mT == torch.arange(side, device=device)).float()
    matrix = chosen @ border
    matrix = matrix / matrix.sum(2, keepdim=True).clamp(min=1e-6)
    return torch.where(out < wanted, matrix, 0)


def photometrically_changed(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed, in random order.

    ``draws``: (6, n) in [0, 1): the order, and the factors.
    """
    order = draws[:3].argsort(0).to(images.device, non_blocking=True)
    factors = (1 + PHOTOMETRIC * (2 * draws[3:] - 1)).to(images.device, non_blocking=True)
    luma = torch.tensor(LUMA)[:, None, None].to(images.device, non_blocking=True)
    for kind, factor in torch.stack([order, factors], 1)[..., None, None, None]:
        gray = (images * luma).sum(1, keepdim=True)
        mean = gray.mean((2, 3), keepdim=True)
        # What a factor of 0 would leave of the image: black, its mean, or itself in gray.
        rest = torch.where(kind == 0, 0.0, torch.where(kind == 1, mean, gray))
        images = (rest + factor * (images - rest)).clamp(0, 1)
    return images
