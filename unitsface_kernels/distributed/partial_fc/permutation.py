"""A permutation of the classes that is computed element by element, in both directions.

The arithmetic of ``csrc/include/unitsface/permutation.h`` in Torch, bit for bit: 32-bit words in
int64, whose multiplication wraps around. It runs where the extension has no kernels, and waits
for the device in every round of the cycles. Places and classes are the same there and here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import dispatch
from ...draws import mix_32

ROUNDS = 12
FEWEST_BITS = 6
_LOW_64 = 2**64 - 1
_STRIDE = 0x9E3779B97F4A7C15


def _mix_64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _LOW_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _LOW_64
    return x ^ x >> 31


def draw_key(*numbers: int) -> int:
    """64 bits that depend on every one of some integers and on their order."""
    key = 0
    for number in numbers:
        key = _mix_64(key + number + _STRIDE & _LOW_64)
    return key


class Permutation:
    """A permutation of [0, size): a Feistel network on a power of two, with cycle walking."""

    def __init__(self, size: int, key: int) -> None:
        bits = max(FEWEST_BITS, (size - 1).bit_length() if size else 0)
        self.size, self.low_bits = size, bits - bits // 2
        self.high_mask, self.low_mask = (1 << bits // 2) - 1, (1 << self.low_bits) - 1
        strides = range(1, ROUNDS + 1)
        self.keys = [_mix_64(key + r * _STRIDE & _LOW_64) >> 32 for r in strides]

    def at(self, places: Tensor) -> Tensor:
        """The class at each place in [0, size)."""
        return self._walk(places, self._forward)

    def place_of(self, classes: Tensor) -> Tensor:
        """The place of each class; ``size`` if it is outside [0, size)."""
        inside = (classes >= 0) & (classes < self.size)
        found = self._walk(torch.where(inside, classes, 0), self._backward) if self.size else 0
        return torch.where(inside, found, self.size)

    def _walk(self, x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
        x = step(x)
        while bool((outside := x >= self.size).any()):
            x = torch.where(outside, step(x), x)
        return x

    def _forward(self, x: Tensor) -> Tensor:
        high, low = x >> self.low_bits, x & self.low_mask
        for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
            high = high ^ mix_32(low ^ first) & self.high_mask
            low = low ^ mix_32(high ^ second) & self.low_mask
        return high << self.low_bits | low

    def _backward(self, x: Tensor) -> Tensor:
        high, low = x >> self.low_bits, x & self.low_mask
        for first, second in reversed(list(zip(self.keys[::2], self.keys[1::2], strict=True))):
            low = low ^ mix_32(high ^ second) & self.low_mask
            high = high ^ mix_32(low ^ first) & self.high_mask
        return high << self.low_bits | low


def drawn_classes(size: int, key: int, count: int, positives: Tensor) -> Tensor:
    """(count,) int64: the classes of all ``positives``, and of the first other places.

    Those of the first places, as long as they leave room for the positives behind them, which
    follow in their order.

    Args:
        positives: (N,) int64 ascending, distinct places, at most ``count``; behind them ``size``,
            any number of times: no places.
    """
    kernels = dispatch.row_kernels(positives.device)
    if kernels is not None:
        return kernels.drawn(key, size, count, positives)
    places = torch.arange(count, device=positives.device)
    if positives.numel():
        real = positives < size
        others = count - real.sum()
        # Others that precede each positive; as many as it has predecessors itself are left out.
        preceding = torch.where(real, positives - torch.arange(len(real)).to(positives), size)
        within = others + (preceding < others).sum()
        behind = positives[(places - others).clamp(min=0)]
        places = torch.where(places < within, places, behind)
    return Permutation(size, key).at(places)


def places_of(size: int, key: int, classes: Tensor) -> Tensor:
    """(N,) int64: the place of each class; ``size`` if it is outside [0, size)."""
    kernels = dispatch.row_kernels(classes.device)
    if kernels is not None:
        return kernels.places(key, size, classes)
    return Permutation(size, key).place_of(classes)
