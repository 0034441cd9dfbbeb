"""Random crops, low resolution and photometric changes, against the published rules in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from train.data.augment import Augment
from train.data.degrade import cropped, low_resolution, photometrically_changed, resampling

SIDE = 28


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, side: int = SIDE) -> torch.Tensor:
    return 0.05 + 0.9 * torch.rand(n, 3, side, side, generator=generator())


def changed(images: torch.Tensor, **chances: float) -> torch.Tensor:
    result = Augment(**chances)(images, generator(5))
    return (result != images).flatten(1).any(1)


@pytest.mark.parametrize("name", ["crop", "low_res", "photometric"])
def test_a_probability_chooses_images_and_the_other_changes_are_drawn_all_the_same(
    name: str,
) -> None:
    images = pictures(200, 16)
    assert not changed(images).any()
    some = changed(images, **{name: 0.2})
    assert 0.1 < some.float().mean() < 0.3
    assert changed(images, **{name: 1.0}).float().mean() > 0.9
    # An image that one change leaves alone is what the others make of it.
    others = {"crop": 0.3, "low_res": 0.3, "photometric": 0.3, name: 0.0}
    without = Augment(**others)(images, generator(5))
    both = Augment(**{**others, name: 0.2})(images, generator(5))
    assert torch.equal(both[~some], without[~some])
    assert not torch.equal(both, without)
    assert 0 <= both.min() <= both.max() <= 1


def test_a_crop_keeps_its_place_and_has_the_published_sizes() -> None:
    draws = torch.rand(22, 500, generator=generator(1))
    result = cropped(torch.ones(500, 3, SIDE, SIDE), draws)
    shares = []
    for image, numbers in zip(result, draws.T.tolist(), strict=True):
        width = height = SIDE
        for k in range(10):  # as RandomResizedCrop.get_params does
            area = (0.2 + 0.8 * numbers[k]) * SIDE**2
            ratio = math.exp(math.log(3 / 4) + numbers[10 + k] * math.log(16 / 9))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= SIDE and h <= SIDE:
                width, height = w, h
                break
        x, y = (int(u * (SIDE - n + 1)) for u, n in zip(numbers[20:], (width, height), strict=True))
        expected = torch.zeros(3, SIDE, SIDE)
        expected[:, y : y + height, x : x + width] = 1
        assert torch.equal(image, expected)
        shares.append(width * height / SIDE**2)
    assert min(shares) < 0.25
    assert 0.5 < sum(shares) / len(shares) < 0.65
    images = pictures(500)
    inside = result == 1
    assert torch.equal(cropped(images, draws), torch.where(inside, images, 0))


@pytest.mark.parametrize(
    ("kernel", "mode"), [(0, "nearest"), (1, "bilinear"), (2, "area"), (3, "bicubic")]
)
@pytest.mark.parametrize("small", [6, 13, 14, 27, 28])
def test_resampling_is_that_of_torch_without_smoothing(kernel: int, mode: str, small: int) -> None:
    images = pictures(2)
    for before, after in ((SIDE, small), (small, SIDE)):
        if mode == "area" and max(before, after) % min(before, after):
            continue  # Torch's windows overlap there, OpenCV's do not
        given = torch.zeros_like(images)
        given[..., :before, :before] = images[..., :before, :before]
        sizes = (torch.tensor([n]) for n in (kernel, before, after))
        matrix = resampling(*sizes, SIDE)
        result = matrix @ given @ matrix.mT
        more = {} if mode in ("nearest", "area") else {"align_corners": False}
        expected = F.interpolate(given[..., :before, :before], (after, after), mode=mode, **more)
        torch.testing.assert_close(result[..., :after, :after], expected, rtol=1e-4, atol=1e-4)
        assert result[..., after:, :].abs().sum() == 0


def test_lanczos_has_four_lobes_and_area_shares_out_pixels() -> None:
    row = resampling(torch.tensor([4]), torch.tensor([20]), torch.tensor([9]), SIDE)[0, 4]
    center = 4.5 * 20 / 9 - 0.5

    def lobes(x: float) -> float:
        if x == 0:
            return 1.0
        return 4 * math.sin(math.pi * x) * math.sin(math.pi * x / 4) / (math.pi * x) ** 2

    weights = [lobes(center - j) if abs(center - j) < 4 else 0.0 for j in range(SIDE)]
    total = sum(weights)
    torch.testing.assert_close(row, torch.tensor([w / total for w in weights]))
    area = resampling(torch.tensor([2]), torch.tensor([5]), torch.tensor([2]), 5)[0]
    expected = torch.tensor([[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
    torch.testing.assert_close(area[:2], expected)


def test_low_resolution_goes_down_and_up_again_by_kernels_of_its_own() -> None:
    images = pictures(40)
    draws = torch.rand(3, 40, generator=generator(2))
    draws[1:] = (draws[1:] > 0.5) * 0.4 + 0.3  # linear, or cubic
    result = low_resolution(images, draws)
    small = [int((0.2 + 0.8 * u) * SIDE) for u in draws[0].tolist()]
    assert min(small) <= 6
    assert max(small) >= 27
    for image, size, kernels, found in zip(images, small, draws[1:].T, result, strict=True):
        down, up = ("bilinear" if k < 0.5 else "bicubic" for k in kernels)
        less = F.interpolate(image[None], (size, size), mode=down, align_corners=False)
        less = less.clamp(0, 1)
        back = F.interpolate(less, (SIDE, SIDE), mode=up, align_corners=False)[0].clamp(0, 1)
        torch.testing.assert_close(found, back, rtol=1e-4, atol=1e-4)
    flat = torch.full((50, 3, SIDE, SIDE), 0.25)
    result = low_resolution(flat, torch.rand(3, 50, generator=generator(2)))
    torch.testing.assert_close(result, flat)


def test_photometric_changes_are_the_published_ones_in_random_order() -> None:
    images, draws = pictures(60), torch.rand(6, 60, generator=generator(3))
    result = photometrically_changed(images, draws)
    orders = set()
    for image, numbers, found in zip(images, draws.T.tolist(), result, strict=True):
        order = sorted(range(3), key=lambda k: numbers[k])
        orders.add(tuple(order))
        for place, kind in enumerate(order):
            factor = 0.5 + numbers[3 + place]
            gray = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
            if kind == 0:
                image = image * factor
            else:
                rest = gray.mean() if kind == 1 else gray
                image = rest + factor * (image - rest)
            image = image.clamp(0, 1)
        torch.testing.assert_close(found, image, rtol=1e-5, atol=1e-6)
    assert len(orders) == 6
