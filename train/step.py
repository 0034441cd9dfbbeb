"""One update of all weights: a batch in one part or several, and the step of the optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unitsface_kernels as uk
from train.config import Config
from train.data.augment import Augment, normalize, to_unit
from train.losses import FaceLoss
from train.optimizer import clip

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep(nn.Module):
    """Backbone and losses as one module, so that one data-parallel wrapper averages all of it.

    Of what is in shards there is nothing to average: it takes the features outside.
    """

    def __init__(self, backbone: nn.Module, loss: FaceLoss) -> None:
        super().__init__()
        self.backbone = backbone
        self.loss = loss

    def forward(
        self,
        images: Tensor | None,
        labels: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        pairs: bool = True,
    ) -> tuple[Tensor, ...]:
        """The terms of :class:`FaceLoss`, and the features; without images, some function of all
        parameters.
        """
        if images is None or labels is None:
            return (sum((p.sum() for p in self.parameters() if p.requires_grad), 0.0),)
        features = self.backbone(images)
        return (*self.loss(features, labels, memory, pairs), features)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    dtype = AMP_DTYPES.get(config.train.amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def fix_gradient_order(parallel: DistributedDataParallel) -> None:
    """Have gradients packed now as they will be in every step.

    Data-parallel training packs them anew after a process's first backward pass, in the order in
    which they came, and the order in which the sums of three or more processes are rounded depends
    on it: the first step of a resumed run would not be that of one that was never cut off.
    """
    (total,) = parallel(None)
    (total * 0.0).backward()
    parallel.zero_grad(set_to_none=True)


def freeze_bn(backbone: nn.Module) -> None:
    """Batch normalization by the stored statistics; weight and bias still learn."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def build_augment(config: Config) -> Augment:
    data = config.data
    return Augment(
        flip=data.flip,
        shift=data.shift,
        zoom=data.zoom,
        rotation=data.rotation,
        brightness=data.brightness,
        contrast=data.contrast,
    )


@dataclass
class Update:
    """Everything that a step touches. ``parallel`` is ``module``, or its data-parallel wrapper."""

    config: Config
    device: torch.device
    rank: int
    module: TrainStep
    parallel: nn.Module
    head: uk.PartialFC | None
    memory: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def __post_init__(self) -> None:
        self._augment = build_augment(self.config)
        #: Whether the last step was taken, or skipped by the gradient scaler.
        self.stepped = False
        self.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: object) -> None:
        self.stepped = True

    def __call__(
        self, images: Tensor, labels: Tensor, *, step: int, lr: float, pairs: bool
    ) -> Tensor:
        """One step; the detached [total, class, pair] losses and the largest norm of a feature.

        Of this process, (4,), on the device: nothing waits for it.
        """
        # Dropout draws from the global generator, augmentation from its own.
        seed = (self.config.run.seed * 1_000_003 + step) * 4096 + self.rank
        torch.manual_seed(seed % 2**63)
        generator = torch.Generator().manual_seed(seed % 2**63)
        images = to_unit(images.to(self.device, non_blocking=True))
        images = normalize(self._augment(images, generator))
        if self.config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        terms, features = self._gradients(images, labels, pairs)
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            clip(self.config, self.module.backbone, self.module.loss, self.head)
        self.stepped = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.memory is not None and self.stepped:
            self.memory.update(features, labels)
        largest = torch.linalg.vector_norm(features.float(), dim=1).max()
        return torch.cat([terms, largest.reshape(1)])

    def _gradients(self, images: Tensor, labels: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the batch, one part after another; its three losses and its features."""
        count = self.config.train.accumulate
        parts = list(
            zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
            if count > 1
            else [(images, labels)]
        )
        sums: Tensor | None = None
        features = []
        for number, (part, part_labels) in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self._no_sync():
                of_part, found = self._backward(
                    part, part_labels, pairs, share=len(part) / len(images)
                )
            sums = of_part if sums is None else sums + of_part
            features.append(found.detach())
        if len(parts) > 1 and self.head is not None:
            # Parts draw classes of their own, and on CUDA a sum of sparse gradients lists those of
            # both twice. Whoever takes a norm wants every class once.
            for parameter in self.head.parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
        assert sums is not None
        return sums, features[0] if len(parts) == 1 else torch.cat(features)

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Without the average over processes, which the last part makes of all."""
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def _backward(
        self, images: Tensor, labels: Tensor, pairs: bool, share: float
    ) -> tuple[Tensor, Tensor]:
        with autocast(self.config, self.device):
            total, class_term, pair_term, features = self.parallel(
                images,
                labels,
                None if self.memory is None else (self.memory.features, self.memory.labels),
                pairs,
            )
            if self.head is not None:
                class_term = self.head(features, labels)
                total = total + self.config.loss.class_weight * class_term
        terms = torch.stack([t.detach().float() for t in (total, class_term, pair_term)])
        if share < 1.0:
            total, terms = total * share, terms * share
        self.scaler.scale(total).backward()
        return terms, features
