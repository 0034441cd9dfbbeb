"""Drawn arguments: numbers, memory layouts and labels that are legal, if unusual."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = [0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 65]
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 16, 20, 31, 33, 48, 63, 64, 65, 100, 130]
DTYPES = [torch.float32] * 14 + [torch.bfloat16] * 3 + [torch.float16] * 3
INTEGERS = [torch.int64] * 4 + [torch.int32, torch.int16, torch.int8, torch.uint8]
#: Hyper-parameters by name; others keep their defaults.
VALUES: dict[str, list] = {
    "scale": [1e-3, 1.0, 4.0, 16, 30.0, 64.0, 64.0, 256.0],
    "margin": [-0.2, 0.0, 0.1, 0.4, 1.0],
    "m1": [0.5, 1.0, 1.0, 1.0, 1.2, 1.7, 4.0],
    "m2": [0.0, 0.0, 0.3, 0.5],
    "m3": [0.0, 0.2, 0.4],
    "t": [1.0, 2.0, 3.0],
    "alpha": [0.3, 0.7],
    "negative_weight": [0.1, 1.0, 3.0],
    "adaptive_margin": [0.0, 0.0, 0.7],
    "k": [1, 1, 2, 5, 64],
    "lower": [-2.0, -2.0, -0.31, 0.17],
    "upper": [2.0, 2.0, 0.43, 0.87],
}


@dataclass
class Source:
    """Random choices and random tensors of one seed."""

    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, options):
        return self.random.choice(options)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)


def features(s: Source, rows: int, width: int, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """(rows, width) of some kind; ``like``: rows that they may resemble."""
    x = s.normal(rows, width)
    kind = s.pick(["plain"] * 6 + ["like"] * 4 + ["one", "axes", "zeros", "norms", "short", "far"])
    if kind == "like" and like is not None and len(like):
        x = like[s.integers(0, len(like), rows)].float() + s.pick([0.0, 0.1, 1.0]) * x
    elif kind == "one":
        x = x[:1].expand(rows, width).clone() if rows else x
    elif kind == "axes":
        place = s.integers(0, width, rows)
        x = torch.nn.functional.one_hot(place, width) * (s.integers(0, 2, rows)[:, None] * 2.0 - 1)
    elif kind == "zeros":
        x[s.uniform(rows) < 0.3] = 0.0
    elif kind == "norms":
        x = x * 10 ** (6 * s.uniform(rows, 1) - 3)
    elif kind == "short":
        # On either side of the smallest norm that counts.
        x = torch.nn.functional.normalize(x, dim=1) * 10 ** (2 * s.uniform(rows, 1) - 6)
    elif kind == "far":
        x = x * s.pick([1e-12, 1e-8, 1e8, 1e12] if dtype == torch.float32 else [1e-2, 1e2])
    x = x.to(dtype)
    if kind == "short" and dtype == torch.float16:
        x = x * 100  # representable
    return x


def labels(s: Source, count: int, kinds: int, wide: bool) -> Tensor:
    """(count,) in [-1, kinds) or, with ``wide``, of any size."""
    kind = s.pick(["random"] * 8 + ["one", "distinct", "ignored", "few ignored"])
    high = max(kinds, 1)
    found = s.integers(0, high, count)
    if kind == "one":
        found = torch.full((count,), s.random.randrange(high))
    elif kind == "distinct" and (wide or kinds >= count):
        found = torch.arange(count)
    elif kind == "few ignored":
        found[s.uniform(count) < 0.3] = -1
    if kind == "ignored" or kinds == 0:
        found = torch.full((count,), -1)
    if wide and s.chance(0.1):
        big = s.pick([2**30 - 1, 2**31 - 1, 2**31, 2**40, 2**62])
        return torch.where(found >= 0, found + big, -1)
    highest, lowest = int(found.max()) if count else 0, int(found.min()) if count else 0
    fitting = [
        t for t in INTEGERS if torch.iinfo(t).min <= lowest and highest <= torch.iinfo(t).max
    ]
    return found.to(s.pick(fitting))


def laid_out(s: Source, x: Tensor) -> Tensor:
    """The same values in another layout of memory."""
    kind = s.pick(["dense"] * 5 + ["transposed", "step", "offset", "expanded", "negated", "bytes"])
    if x.dim() == 0 or not x.numel():
        return x
    if kind == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if kind == "step":
        held = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77, dtype=x.dtype)
        held[..., ::2] = x
        return held[..., ::2]
    if kind == "offset":
        held = torch.full((x.shape[0] + 2, *x.shape[1:]), 77, dtype=x.dtype)
        held[1:-1] = x
        return held[1:-1]
    if kind == "expanded" and bool((x == x[:1]).all()):
        return x[:1].expand(x.shape)
    if kind == "negated" and x.is_floating_point():
        return torch._neg_view(-x)
    if kind == "bytes":
        # Behind a header of odd length, as of a file in memory.
        held = bytearray(b"\x77") + bytearray(x.contiguous().view(-1).view(torch.uint8).numpy())
        return torch.frombuffer(held, dtype=x.dtype, offset=1).view(x.shape)
    return x
