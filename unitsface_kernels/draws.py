"""Random numbers that are functions of keys and places, the same on every device and rank."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

LOW_32 = 2**32 - 1

Bits = TypeVar("Bits", int, Tensor)


def mix_32(x: Bits) -> Bits:
    """A permutation of 32-bit words (of int64) whose every bit depends on all of them."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & LOW_32
    x = ((x ^ x >> 13) * 0xC2B2AE35) & LOW_32
    return x ^ x >> 16


def normal(seed: int, draw: Tensor, places: Tensor) -> Tensor:
    """Standard normal numbers, float32, by seed, number of the draw () and places (N,), int64."""
    key = mix_32((draw & LOW_32) ^ mix_32(seed & LOW_32))
    bits = mix_32(mix_32((places & LOW_32) ^ key) ^ mix_32(key + 1 & LOW_32))
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return (math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)).to(torch.float32)
