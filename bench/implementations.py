"""Implementations of a workload: fused (ours), eager PyTorch, its compiler, other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .baselines import eager, metric_learning, peers, sharded
from .workloads import SCALE, Workload

EAGER = {
    "uss": eager.uss_eager,
    "margin_softmax": eager.cosface_eager,
    "uce": eager.uce_eager,
    "clip": eager.clip_eager,
    "siglip": eager.siglip_eager,
}
PUBLISHED = {
    "uss": eager.uss_published,
    "margin_softmax": eager.cosface_published,
    "uce": eager.uce_published,
    "clip": eager.clip_published,
    "siglip": eager.siglip_published,
}
OURS = ("native", "native-float32", "triton", "auto")
# The implementation that speedups refer to. On CUDA the fastest backend depends on the shape.
PRIMARY = {"cpu": "native", "cuda": "auto"}
NAMES = (
    *(*OURS, "eager", "torch.compile", "published", "sharded", "metric-learning"),
    *peers.PEERS,
)

# Peak memory besides inputs and gradients, as numbers of N x M float32 matrices and of copies of
# the columns. Rounded up from measurements.
PEAKS = {
    "pair": {"eager": (5, 0), "torch.compile": (2.5, 0), "published": (15, 0)},
    "memory": {"eager": (5, 2), "torch.compile": (2.5, 2), "published": (13, 2)},
    "towers": {"eager": (6, 4), "torch.compile": (4, 4), "published": (8, 4)},
    "class": {"eager": (3, 4), "torch.compile": (2, 2), "published": (4, 4), "sharded": (3, 4)},
}
METRIC_LEARNING_PEAK = {"pair": (14, 0), "memory": (14, 2), "class": (6, 4)}
# FLOPs of a step beyond which torch.compile is not run on the CPU.
LONGEST_COMPILED = 1.5e12
# Other packages' fused kernels, which store less than the matrix.
FUSED_PEAK = (1, 4)


@dataclass(frozen=True)
class Implementation:
    """A loss that takes the keywords that ``Workload.inputs`` returns.

    Attributes:
        formula: the same computation in plain PyTorch, for the check in float64.
        same_formula: the formula is that of the fused loss.
        compiled: its first step compiles.
        autocast: device type under whose bfloat16 autocast it runs.
        skip_tolerance: bound of the gradient filtering.
        bytes: predicted peak above inputs and gradients.
    """

    loss: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    same_formula: bool = True
    compiled: bool = False
    autocast: str | None = None
    skip_tolerance: float = 0.0
    bytes: float = 0.0

    def __call__(self, **inputs: Tensor) -> Tensor:
        if self.autocast is None:
            return self.loss(**inputs)
        with torch.autocast(self.autocast, torch.bfloat16):
            return self.loss(**inputs)


def _lazily_compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile when first called: its import alone takes a second."""
    compiled: Callable[..., Tensor] | None = None

    def call(**inputs: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is None:
            # Static shapes: what a training loop with full batches gets.
            compiled = torch.compile(loss, dynamic=False)
        return compiled(**inputs)

    return call


def _predicted_bytes(workload: Workload, name: str) -> float:
    if name in OURS:
        return 0.0
    topology = workload.topology
    if name == "metric-learning":
        matrices, copies = METRIC_LEARNING_PEAK[topology]
    else:
        matrices, copies = PEAKS[topology].get(name, FUSED_PEAK)
    columns = workload.columns or workload.rows
    return 4.0 * columns * (matrices * workload.rows + copies * workload.size)


def implementations(workload: Workload, device: str = "cpu") -> dict[str, Implementation]:
    """Implementations of the workload, ours first. A missing package fails when called."""
    options = {"scale": SCALE, "margin": workload.margin}
    if workload.topology == "towers":
        options = {}
    best = partial(EAGER[workload.loss], **options)
    autocast = device if workload.autocast else None
    found: dict[str, Implementation] = {}

    def add(
        name: str,
        loss: Callable[..., Tensor],
        formula: Callable[..., Tensor] = best,
        autocast: str | None = autocast,
    ) -> None:
        found[name] = Implementation(
            loss,
            formula,
            same_formula=formula is best,
            compiled=name == "torch.compile",
            autocast=autocast,
            skip_tolerance=workload.skip_tolerance if name in OURS else 0.0,
            bytes=_predicted_bytes(workload, name),
        )

    add("native", workload.fused("native"))
    if workload.autocast:
        add("native-float32", workload.fused("native"), autocast=None)
    if device == "cuda":
        add("triton", workload.fused("triton"))
    # For larger workloads on the CPU this is the native backend.
    if device == "cuda" or workload.flops < 1e9:
        add("auto", workload.fused("auto"))
    add("eager", best)
    # Compiled code needs two first steps, which take most of a minute there.
    if device == "cuda" or workload.flops < LONGEST_COMPILED:
        add("torch.compile", _lazily_compiled(best))
    if workload.thorough or device == "cuda":
        add("published", partial(PUBLISHED[workload.loss], **options))
        if workload.loss == "margin_softmax":
            add("sharded", partial(sharded.cosface_sharded, **options))
            add("metric-learning", partial(metric_learning.cosface, **options))
        elif workload.loss == "uss":
            add(
                "metric-learning",
                partial(metric_learning.multi_similarity, scale=SCALE),
                partial(metric_learning.multi_similarity_formula, scale=SCALE),
            )
    if device == "cuda" or workload.thorough:
        for name, loss in peers.peer_losses(workload, device).items():
            add(name, loss, peers.oracle(workload, name))
    return found
