"""One update of all weights."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import unitsface_kernels as uk
from train.config import Config
from train.data.augment import Augment, normalize, to_unit
from train.distributed import DistributedEnv
from train.divergence import ScaleWatch, first_bad_gradient, first_not_finite
from train.losses import FaceLoss
from train.step_clock import StepClock

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BackboneAndLoss(nn.Module):
    """One module, so that one data-parallel wrapper averages all of it.

    Classes in shards have nothing to average: their head takes the features outside.
    """

    def __init__(self, backbone: nn.Module, loss: FaceLoss) -> None:
        super().__init__()
        self.backbone = backbone
        self.loss = loss

    def forward(self, images: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        """The terms of :class:`FaceLoss`, which takes what is ``given`` beside the features, and
        the features; without images, some function of all parameters.
        """
        if images is None:
            return (sum((p.sum() for p in self.parameters() if p.requires_grad), 0.0),)
        features = self.backbone(images)
        return (*self.loss(features, *given), features)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    dtype = AMP_DTYPES.get(config.train.amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def data_parallel(module: BackboneAndLoss, world: DistributedEnv) -> nn.Module:
    """The module as it is trained: with several processes, its gradients are averaged over them."""
    if world.size == 1:
        return module
    gpus = [world.device.index] if world.device.type == "cuda" else None
    parallel = DistributedDataParallel(module, device_ids=gpus)
    rebuild_ddp_buckets(parallel)
    return parallel


def rebuild_ddp_buckets(parallel: DistributedDataParallel) -> None:
    """Have gradients packed now as they will be in every step.

    Data-parallel training packs them anew after a process's first backward pass, in the order in
    which they came, and the order in which the sums of three or more processes are rounded depends
    on it: the first step of a resumed run would not be that of one that was never cut off.
    """
    (total,) = parallel(None)
    (total * 0.0).backward()
    parallel.zero_grad(set_to_none=True)


@dataclass
class TrainStep:
    """A step of training, with all that it changes."""

    config: Config
    world: DistributedEnv
    module: BackboneAndLoss
    head: uk.PartialFC | None  # the class loss, where its classes are in shards
    memory: uk.FeatureMemory | None
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    watch: ScaleWatch
    clock: StepClock

    def __post_init__(self) -> None:
        data = vars(self.config.data)
        self.augment = Augment(**{f.name: data[f.name] for f in dataclasses.fields(Augment)})
        self.parallel = data_parallel(self.module, self.world).train()
        if self.config.model.freeze_bn:  # weight and bias still learn
            for module in self.module.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.stepped = False  # in this step, or skipped by the gradient scaler
        self.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: object) -> None:
        self.stepped = True

    def __call__(
        self, images: Tensor, labels: Tensor, *, step: int, lr: float, pairs: bool
    ) -> Tensor:
        """One step; returns (4,) detached [total, class, pair] losses and the largest feature norm.

        Values are those of this process and stay on the device: nothing waits for it.
        """
        config, device, head, memory = self.config, self.world.device, self.head, self.memory
        self.clock.mark()
        # Dropout draws from the global generator, augmentation from its own.
        seed = ((config.run.seed * 1_000_003 + step) * 4096 + self.world.rank) % 2**63
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        images = to_unit(images.to(device, non_blocking=True))
        images = normalize(self.augment(images, generator))
        if config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.mark("augment")

        columns = None if memory is None else (memory.features, memory.labels)
        count = config.train.accumulate
        parts = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
        part_terms, part_features = [], []
        for number, (part, part_labels) in enumerate(parts, 1):
            weight = len(part) / len(images)
            # The last part averages the gradients of all over the processes.
            several = isinstance(self.parallel, DistributedDataParallel) and number < count
            with self.parallel.no_sync() if several else nullcontext():
                with autocast(config, device):
                    stored = self._momentum_feats(part)
                    total, class_term, pair_term, features = self.parallel(
                        part, part_labels, columns, pairs, None if head is not None else stored
                    )
                    if head is not None:
                        class_term = head(features, part_labels, momentum_feats=stored)
                        total = total + config.loss.class_weight * class_term
                terms = torch.stack([t.detach().float() for t in (total, class_term, pair_term)])
                self.clock.mark("forward")
                self.scaler.scale(total * weight).backward()
                self.clock.mark("backward")
            part_terms.append(terms * weight)
            part_features.append(features.detach())
        if count > 1 and head is not None:
            # Parts draw classes of their own, and on CUDA a sum of sparse gradients lists those of
            # both twice. A norm takes every class once.
            for parameter in head.parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()

        if self.watch.suspicious:  # before an infinite norm has spoiled the others
            self.watch.gradient = first_bad_gradient((self.module, head))
        if config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            if config.train.clip_classes:
                heads = [] if head is None else [head]
                uk.clip_grad_norm_([*self.module.parameters()], config.train.clip_norm, heads)
            else:  # the same on every process, whatever is in shards
                backbone = self.module.backbone.parameters()
                nn.utils.clip_grad_norm_(backbone, config.train.clip_norm)
        self.stepped = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        terms = sum(part_terms[1:], part_terms[0])
        if self.scaler.is_enabled():
            tried = self.module.backbone, images.tensor_split(count), terms
            find = partial(first_not_finite, *tried, lambda: autocast(config, device))
            self.watch.after(step + 1, self.stepped, terms, find)

        features = torch.cat(part_features)
        if self.stepped and memory is not None:
            memory.update(features, labels)
        if self.stepped and self.ema is not None:
            self.ema.update_parameters(self.module.backbone)
        largest = torch.linalg.vector_norm(features.float(), dim=1).max()
        self.clock.mark("optimizer")
        return torch.cat([terms, largest.reshape(1)])

    @torch.no_grad()
    def _momentum_feats(self, images: Tensor) -> Tensor | None:
        """Features of the averaged weights, if the class loss is to store them."""
        if not self.config.loss.class_momentum:
            return None
        assert self.ema is not None
        return self.ema.module.eval()(images)
