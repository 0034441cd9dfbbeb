"""Random numbers that are functions of keys and places, the same on every device and rank."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from . import dispatch

LOW_32 = 2**32 - 1

Bits = TypeVar("Bits", int, Tensor)


def mix_32(x: Bits) -> Bits:
    """A permutation of 32-bit words (of int64) whose every bit depends on all of them."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & LOW_32
    x = ((x ^ x >> 13) * 0xC2B2AE35) & LOW_32
    return x ^ x >> 16


def centered(seed: int, draw: Tensor, first: int, count: int) -> Tensor:
    """Numbers between -1 and 1, (N,) float64, as of :func:`normal`."""
    kernels = dispatch.draw_kernels(draw.device)
    if kernels is not None:
        found: Tensor = kernels.centered(seed, draw, first, count)
        return found
    places = torch.arange(first, first + count, device=draw.device)
    key = mix_32((draw & LOW_32) ^ mix_32(seed & LOW_32))
    bits = mix_32(mix_32((places & LOW_32) ^ key) ^ mix_32(key + 1 & LOW_32))
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return 2.0 * uniform - 1.0


def normal(seed: int, draw: Tensor, first: int, count: int) -> Tensor:
    """Standard normal numbers (N,), float32, by seed, number of the draw () and place: the count
    ``N`` from the place ``first``.
    """
    return (math.sqrt(2.0) * torch.erfinv(centered(seed, draw, first, count))).to(torch.float32)
