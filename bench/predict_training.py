"""Time and memory that the recipes of train/configs should take: the table of docs/training.md.

Operations and tensors are counted on fake tensors, rates are assumed (see :mod:`bench.predict`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from train.backbones import build_backbone
from train.config import Config, make_config, read_yaml
from train.losses import NO_LOSS
from train.tools.dry_run import kept_per_image

from .cost import Machine, Step

SETS = Path(__file__).resolve().parent.parent / "train" / "configs" / "data"
LOSS = SETS.parent / "loss" / "unitsface.yaml"
# Not timm's, which not everybody can import.
RECIPES = ("casia_r50", "webface4m_r50", "glint360k_r100", "webface42m_r200")
FLOAT = 4


@dataclass(frozen=True)
class Backbone:
    operations: float  # of a forward pass of one image
    parameters: int
    saved: float  # bytes that the backward pass of one image needs, as ``--dry-run`` counts them
    moved: float  # bytes that the operators of its forward pass read and write


def count(config: Config) -> Backbone:
    """The slope between batches of 2 and 4: what does not grow with the batch drops out."""
    measured = []
    with FakeTensorMode():
        backbone = build_backbone(config.model.name, config.model.input_size, config.model.dropout)
        for batch in (2, 4):
            images = torch.empty(batch, 3, config.model.input_size, config.model.input_size)
            with (
                FlopCounterMode(display=False) as counter,
                _Traffic() as traffic,
                torch.autocast("cpu", torch.bfloat16),
            ):
                backbone(images)
            measured.append((counter.get_total_flops(), traffic.bytes))
        parameters = sum(p.numel() for p in backbone.parameters())
    operations, moved = ((b - a) / 2 for a, b in zip(*measured, strict=True))
    return Backbone(operations, parameters, kept_per_image(config), moved)


class _Traffic(TorchDispatchMode):
    """Adds up the tensors that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # What asks for a device or a size gives no tensor.
        if func.namespace == "aten" and not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@dataclass(frozen=True)
class Prediction:
    step_seconds: float
    hours: float  # of all epochs
    images_per_s: float
    gigabytes: float  # of a process


def predict(
    config: Config, ranks: int, machine: Machine, convolutions: float, backbone: Backbone
) -> Prediction:
    """One process of ``ranks``; ``convolutions`` are operations per second of the backbone."""
    images = config.train.batch_size // ranks
    pairs = config.loss.pair_name != NO_LOSS
    classes = config.data.num_identities
    sharded = ranks > 1 or config.partial_fc.sample_rate < 1.0
    mode = "separate" if config.partial_fc.fused_optimizer == "none" else "fused"
    rate = config.partial_fc.sample_rate if sharded else 1.0
    head = Step(ranks, images, classes, sample_rate=rate, mode=mode)
    # Backward reads and writes about twice what forward does.
    seconds = 3 * images * (backbone.operations / convolutions + backbone.moved / machine.memory)
    if ranks > 1:  # averaged while the backward pass goes on, unless that takes longer
        averaging = 2 * (ranks - 1) / ranks * backbone.parameters * FLOAT / machine.link
        seconds = max(seconds, averaging)
    seconds += machine.compute_seconds(head) + machine.exchange_seconds(head)
    held = 3 * FLOAT * backbone.parameters + images * backbone.saved + head.held()
    if pairs and config.loss.memory:
        # Every rank compares its own rows with the memory, which has no gradient: two products.
        seconds += 2 * 2.0 * images * classes * head.size / machine.products
        held += FLOAT * head.size * classes
    steps = config.train.epochs * (config.data.num_images // config.train.batch_size)
    speed = config.train.batch_size / seconds
    return Prediction(seconds, steps * seconds / 3600, speed, held / 1e9)


def rows(
    machine_of: Callable[[int], Machine], convolutions: float, capacity: float
) -> list[list[str]]:
    """A row per data set and number of GPUs, with UniTSFace's losses."""
    out = []
    for name in RECIPES:
        path = SETS / f"{name}.yaml"
        config = make_config((str(path), read_yaml(path)), (str(LOSS), read_yaml(LOSS)))
        backbone = count(config)
        for ranks in (1, 8, 64):
            if config.train.batch_size // ranks < 16:
                continue
            found = predict(config, ranks, machine_of(ranks), convolutions, backbone)
            fits = found.gigabytes * 1e9 < 0.9 * capacity
            out.append(
                [
                    f"`{name}`",
                    str(ranks),
                    str(config.train.batch_size // ranks),
                    f"{1e3 * found.step_seconds:.0f} ms",
                    f"{found.images_per_s:,.0f}",
                    f"{found.hours:,.1f} h",
                    f"{found.gigabytes:.0f} GB" + ("" if fits else " (too much)"),
                ]
            )
    return out


HEADER = ["set", "GPUs", "images of a GPU", "step", "images/s", "all epochs", "memory of a GPU"]
