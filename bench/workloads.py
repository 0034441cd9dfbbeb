"""Named shapes, and the work of one contestant on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unitsface_kernels import fused_margin_softmax_loss, fused_uss_loss

from .baselines import eager as baselines

SCALE, PAIR_MARGIN, CLASS_MARGIN = 64.0, 0.1, 0.4
IMAGES_PER_IDENTITY = 4


@dataclass(frozen=True)
class Workload:
    """Rows against columns, forward and backward.

    Attributes:
        loss: registry name.
        rows, columns, size: N, M (or C) and D; ``columns`` 0: in-batch.
        products: GEMMs of 2 N M D operations that the fused algorithm needs.
    """

    name: str
    loss: str
    rows: int
    columns: int
    size: int
    products: float

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * (self.columns or self.rows) * self.size * self.products

    def inputs(self) -> dict[str, Tensor]:
        """Random features of norm about 20, as a backbone gives them; leaves with gradients."""
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(self.rows, self.size, generator=generator)
        identities = max(self.columns or self.rows // IMAGES_PER_IDENTITY, 1)
        labels = torch.randint(0, identities, (self.rows,), generator=generator)
        if self.columns:
            weight = torch.randn(self.columns, self.size, generator=generator)
            return {
                "feats": feats.requires_grad_(),
                "weight": weight.requires_grad_(),
                "labels": labels,
            }
        return {
            "feats": feats.requires_grad_(),
            "labels": labels,
            "b": torch.tensor(20.0, requires_grad=True),
        }

    def contestants(self) -> dict[str, Callable[..., Tensor]]:
        """Loss functions of the keywords that :meth:`inputs` returns, ours first."""
        if self.columns:
            fused = partial(fused_margin_softmax_loss, scale=SCALE, m3=CLASS_MARGIN)
            eager = partial(baselines.cosface_eager, scale=SCALE, margin=CLASS_MARGIN)
            published = partial(baselines.cosface_published, scale=SCALE, margin=CLASS_MARGIN)
        else:
            fused = partial(fused_uss_loss, scale=SCALE, margin=PAIR_MARGIN)
            eager = partial(baselines.uss_eager, scale=SCALE, margin=PAIR_MARGIN)
            published = partial(baselines.uss_published, scale=SCALE, margin=PAIR_MARGIN)
        return {
            "native": partial(fused, backend="native"),
            "eager": eager,
            "torch.compile": torch.compile(eager),
            "published": published,
        }


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("small", "uss", 64, 0, 128, 1.5),
        Workload("pair-1k", "uss", 1024, 0, 512, 1.5),
        Workload("pair-8k", "uss", 8192, 0, 512, 1.5),
        Workload("class-casia", "margin_softmax", 512, 10_572, 512, 4.0),
        Workload("class-100k", "margin_softmax", 512, 100_000, 512, 4.0),
    )
}


def step(loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Forward and backward; gradients start from None, as after ``zero_grad()``."""
    for tensor in inputs.values():
        tensor.grad = None
    value = loss(**inputs)
    value.backward()
    return value
