"""Workloads: named shapes, their regime and the FLOPs of the fused algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from unitsface_kernels import (
    fused_clip_loss,
    fused_margin_softmax_loss,
    fused_siglip_loss,
    fused_uce_loss,
    fused_uss_loss,
)

SCALE, PAIR_MARGIN, CLASS_MARGIN = 64.0, 0.1, 0.4


def clip(feats: Tensor, texts: Tensor, scale: Tensor, **options) -> Tensor:
    return fused_clip_loss(feats, texts, scale, **options)


def siglip(feats: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, **options) -> Tensor:
    return fused_siglip_loss(feats, texts, scale, bias, **options)


FUSED = {
    "uss": fused_uss_loss,
    "margin_softmax": fused_margin_softmax_loss,
    "uce": fused_uce_loss,
    "clip": clip,
    "siglip": siglip,
}
# Per row, in units of the largest gradient that one pair can have.
SKIP_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workload:
    """Rows against columns, forward and backward.

    Attributes:
        loss: registry name.
        rows, columns, size: N, M (or C) and D; ``columns`` 0: in-batch.
        gemms: number of GEMMs of 2 N M D FLOPs in the fused algorithm, on the CPU.
        on: devices on which it is run by default.
        target_cosine: mean cosine of features with their class or identity, with the threshold
            at its optimum; None: random directions and the threshold at the start of training.
        skip_tolerance: given to the fused losses.
        autocast: bfloat16 autocast over float32 tensors.
        thorough: also the slow implementations on the CPU.
    """

    name: str
    loss: str
    rows: int
    columns: int
    size: int
    gemms: float
    on: tuple[str, ...] = ("cpu", "cuda")
    target_cosine: float | None = None
    skip_tolerance: float = 0.0
    autocast: bool = False
    thorough: bool = False

    @property
    def topology(self) -> str:
        """Where columns come from: "pair", "memory" (without gradient), "class" or "towers"."""
        if not self.columns:
            return "pair"
        if self.loss in ("clip", "siglip"):
            return "towers"
        return "memory" if self.loss == "uss" else "class"

    @property
    def trained(self) -> bool:
        return self.target_cosine is not None

    @property
    def flops(self) -> float:
        return self.flops_on("cpu")

    def flops_on(self, device: str) -> float:
        """FLOPs of the fused algorithm; on CUDA it keeps no cosines of a softmax over classes."""
        return 2.0 * self.rows * (self.columns or self.rows) * self.size * self.gemms_on(device)

    def gemms_on(self, device: str) -> float:
        return 4.0 if device == "cuda" and self.loss == "margin_softmax" else self.gemms

    @property
    def margin(self) -> float:
        return CLASS_MARGIN if self.topology == "class" else PAIR_MARGIN

    def dtype(self, device: str) -> torch.dtype:
        """Type of features and weights in training on such a device."""
        return torch.bfloat16 if device == "cuda" else torch.float32

    def shrunk(self, rows: int, columns: int) -> Workload:
        """The same work on at most this many rows and columns."""
        rows = min(self.rows, rows)
        # Row i of one tower matches row i of the other.
        most = rows if self.topology == "towers" else columns
        return replace(self, rows=rows, columns=min(self.columns, most))

    def fused(self, backend: str) -> Callable[..., Tensor]:
        """The fused loss, for the keywords that :meth:`inputs` returns."""
        margin = "m3" if self.loss == "margin_softmax" else "margin"
        options = {"scale": SCALE, margin: self.margin}
        if self.topology == "towers":
            options = {}  # the scale is learned
        if self.skip_tolerance:
            options["skip_tolerance"] = self.skip_tolerance
        return partial(FUSED[self.loss], backend=backend, **options)


def _pair(name: str, rows: int, **options) -> Workload:
    return Workload(name, "uss", rows, 0, options.pop("size", 512), 1.5, **options)


def _class(name: str, rows: int, columns: int, **options) -> Workload:
    # Cosines of the first D rows are kept, the others are computed twice.
    again = max(rows - 512, 0) / rows
    return Workload(name, "margin_softmax", rows, columns, 512, 3.0 + again, **options)


def _memory(name: str, rows: int, columns: int, **options) -> Workload:
    return Workload(name, "uss", rows, columns, 512, 2.0, **options)


CASIA, GLINT = 10_572, 360_232  # identities of CASIA-WebFace and Glint360K


def _towers(loss: str, rows: int, gemms: float) -> Workload:
    # Not among the counted CUDA steps.
    return Workload(f"{loss}-8k", loss, rows, rows, 512, gemms, on=("cpu",))


# A model in late training, and a converged one.
TRAINED = {"target_cosine": 0.7, "skip_tolerance": SKIP_TOLERANCE}
CONVERGED = {"target_cosine": 0.85, "skip_tolerance": SKIP_TOLERANCE}

WORKLOADS = {
    workload.name: workload
    for workload in (
        _pair("small", 64, size=128, thorough=True),
        _pair("pair-1k", 1024, thorough=True),
        _pair("pair-8k", 8192, thorough=True),
        _pair("pair-8k-bf16", 8192, on=("cpu",), autocast=True),
        _pair("pair-32k", 32_768),
        _memory("memory-casia", 512, CASIA, thorough=True),
        _memory("memory-glint", 1024, GLINT),
        _memory("memory-glint-trained", 1024, GLINT, **TRAINED),
        _class("class-casia", 512, CASIA, thorough=True),
        _class("class-100k", 512, 100_000, thorough=True),
        _class("class-100k-trained", 512, 100_000, **TRAINED),
        _class("class-100k-converged", 512, 100_000, **CONVERGED),
        _class("class-400k", 128, 400_000),
        _class("class-glint", 1024, GLINT),
        _class("class-glint-trained", 1024, GLINT, on=("cuda",), **TRAINED),
        _class("class-1m", 1024, 1_000_000, on=("cuda",)),
        _class("class-1m-trained", 1024, 1_000_000, on=("cuda",), **TRAINED),
        Workload("uce-100k", "uce", 512, 100_000, 512, 3.0),
        _towers("clip", 8192, 4.0),
        _towers("siglip", 8192, 3.0),
    )
}


def step(loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Forward and backward; gradients start from None, as after ``zero_grad()``."""
    for tensor in inputs.values():
        tensor.grad = None
    value = loss(**inputs)
    value.backward()
    return value
