"""The training loop.

Every random number is a function of (seed, step, rank) and the learning rate one of the step, so
the state of a run is its step and its tensors: a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import unitsface_kernels as uk
from train import checkpoint
from train.backbones import build_backbone
from train.config import Config, to_dict
from train.data.augment import Augment, normalise, to_unit
from train.data.loader import ImageSource
from train.data.sampler import epoch_order, rank_batches, steps_per_epoch
from train.distributed import World
from train.errors import DivergedError, UserError
from train.losses import (
    NO_LOSS,
    FaceLoss,
    build_head,
    build_loss,
    first_threshold,
    set_epoch,
    shards_classes,
    try_head,
    try_loss,
)
from train.optimizer import build_optimizer, build_scaler, clip
from train.run_folder import MetricsLog
from train.schedule import learning_rate

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
        images: Tensor,
        labels: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        pairs: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The terms of :class:`FaceLoss`, and the features."""
        features = self.backbone(images)
        return (*self.loss(features, labels, memory, pairs), features)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    dtype = AMP_DTYPES.get(config.train.amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Trainer:
    """One training run of one process. ``fit`` may be called once."""

    def __init__(
        self, config: Config, world: World, source: ImageSource, *, load_weights: bool = True
    ) -> None:
        self.config, self.world, self.source = config, world, source
        train = config.train
        self.steps_per_epoch = steps_per_epoch(len(source.images), train.batch_size)
        self.total_steps = train.epochs * self.steps_per_epoch
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.step = 0

        torch.manual_seed(config.run.seed)  # the same initial weights on every process
        model = config.model
        self.backbone = build_backbone(
            model.name, model.input_size, model.dropout, model.embedding_size, model.options
        )
        sharded = shards_classes(config.loss, config.partial_fc, world.size)
        self.loss = build_loss(
            class_name=NO_LOSS if sharded else config.loss.class_name,
            pair_name=config.loss.pair_name,
            num_classes=len(source.images.identities),
            embedding_size=model.embedding_size,
            class_options=config.loss.class_options,
            pair_options=config.loss.pair_options,
            class_weight=config.loss.class_weight,
            pair_weight=config.loss.pair_weight,
            backend=config.loss.backend,
            group=world.group if config.loss.pair_across_ranks else None,
            class_until_pairs=config.loss.class_until_filled,
        )
        self.head: uk.PartialFC | None = None
        if sharded:
            self.head = build_head(
                config.loss.class_name,
                len(source.images.identities),
                model.embedding_size,
                sample_rate=config.partial_fc.sample_rate,
                seed=config.run.seed,
                device=world.device,
                options=config.loss.class_options,
                backend=config.loss.backend,
            )
        if config.model.weights and load_weights:
            path = Path(config.model.weights)
            state = checkpoint.read(path)
            checkpoint.load_backbone(self.backbone, state, path=path, config=config, averaged=True)
        self.module = TrainStep(self.backbone, self.loss).to(world.device)
        # Not part of the module: data-parallel training would broadcast it at every step, and it
        # is the same on every process anyway.
        self.memory: nn.Module | None = None
        if config.loss.memory:
            identities = len(source.images.identities)
            self.memory = uk.FeatureMemory(identities, model.embedding_size).to(world.device)
        try_loss(self.loss, model.embedding_size, world.device)
        if self.head is not None:
            try_head(self.head, model.embedding_size, world.device)
        if config.model.channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(config, self.backbone, self.loss, self.head)
        self.scaler = build_scaler(config, world)
        data = config.data
        self.augment = Augment(
            flip=data.flip,
            shift=data.shift,
            zoom=data.zoom,
            rotation=data.rotation,
            brightness=data.brightness,
            contrast=data.contrast,
        )
        if world.device.type == "cuda":
            torch.backends.cudnn.deterministic = config.run.deterministic
            torch.backends.cudnn.benchmark = not config.run.deterministic

    # -- state ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All there is, but for what is in shards and its optimiser."""
        values = {
            "format": checkpoint.FORMAT,
            "config": to_dict(self.config),
            "identities": list(self.source.images.identities),
            "backbone": self.backbone.state_dict(),
            "loss": self.loss.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "scaler": self.scaler.state_dict(),
            "trainer": {"step": self.step, "threshold": self.threshold()},
        }
        return values if self.head else {**values, "optimizer": self.optimizer.state_dict()}

    def save(self, folder: Path) -> None:
        """The last checkpoint of a run folder; every process calls."""
        if self.head is not None:
            path = folder / checkpoint.LAST_SHARDED
            checkpoint.save_sharded(self.state(), path, self.head, self.optimizer)
        elif self.world.is_main:
            checkpoint.save_atomically(self.state(), folder / checkpoint.LAST)

    def load_state(self, values: dict[str, Any], path: Path) -> None:
        checkpoint.load_backbone(self.backbone, values, path=path, config=self.config)
        if values["identities"] != list(self.source.images.identities):
            raise UserError(
                f"{path} was trained on other identities ({len(values['identities'])}) than "
                f"those of data.path ({len(self.source.images.identities)})"
            )
        if checkpoint.is_sharded(path) != (self.head is not None):
            held = "shards of classes" if self.head is None else "no shards of classes"
            raise UserError(f"{path} holds {held}; leave partial_fc.enabled as it was")
        checkpoint.load_module(self.loss, values["loss"], what="loss", path=path)
        if self.memory is not None:
            if values.get("memory") is None:
                raise UserError(f"{path} was trained without loss.memory and holds none")
            checkpoint.load_module(self.memory, values["memory"], what="memory", path=path)
        if self.head is not None:
            checkpoint.load_sharded(path, self.head, self.optimizer)
        else:
            self.optimizer.load_state_dict(values["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.step = int(values["trainer"]["step"])

    # -- loop -------------------------------------------------------------------------------

    def fit(self, folder: Path, stop: Callable[[int], bool] = lambda step: False) -> bool:
        """Train to the end, or until ``stop(step)`` after a step. True at the end.

        Either way the last checkpoint is that of the last step done.
        """
        parallel: nn.Module = self.module
        if self.world.size > 1:
            gpus = [self.world.device.index] if self.world.device.type == "cuda" else None
            parallel = DistributedDataParallel(self.module, device_ids=gpus)
        run = self.config.run
        log = None
        if self.world.is_main:
            log = MetricsLog(folder, tensorboard=run.tensorboard, first_step=self.step + 1)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not (run.progress and self.world.is_main),
            dynamic_ncols=True,
        )
        meter = _Meter(self.world)
        parallel.train()
        if self.config.model.freeze_bn:
            freeze_bn(self.backbone)
        try:
            while self.step < self.total_steps:
                for losses in (self.loss, self.head):
                    if losses is not None:
                        set_epoch(losses, self.step // self.steps_per_epoch)
                for images, labels in self._epoch_batches():
                    terms = self._train_step(parallel, images, labels)
                    self.step += 1
                    bar.update()
                    meter.add(terms, len(labels))
                    at_end = self.step == self.total_steps
                    stopping = stop(self.step) or at_end
                    epoch_end = self.step % self.steps_per_epoch == 0
                    if self.step % run.log_every == 0 or epoch_end or stopping:
                        self._log(meter, log, bar)
                    epochs_done = self.step // self.steps_per_epoch
                    saving = stopping or (epoch_end and epochs_done % run.save_every == 0)
                    if saving:
                        self.save(folder)
                    if stopping:
                        return at_end
        finally:
            bar.close()
            if log is not None:
                log.close()
        return True

    def _epoch_batches(self) -> Any:
        """The batches of the current epoch that are still to come."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = epoch_order(
            self.source.images.labels,
            seed=self.config.run.seed,
            epoch=epoch,
            images_per_identity=self.config.data.images_per_identity,
            sampler=self.config.data.sampler,
            batch_size=self.config.train.batch_size,
        )
        batches = rank_batches(
            order,
            batch_size=self.config.train.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        left = min(len(batches), self.total_steps - epoch * self.steps_per_epoch)
        return self.source.batches(batches[done:left])

    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.config.train, self.step, self.total_steps, self.steps_per_epoch)

    def _has_pairs(self, step: int) -> bool:
        """Whether the pair loss takes part in this step, counted from 0."""
        filling = self.memory is not None and step < self.steps_per_epoch
        return self.loss.pair_loss is not None and not filling

    def _train_step(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """One update; returns the detached [total, class, pair] losses of this process, (3,)."""
        device = self.world.device
        # Dropout draws from the global generator, augmentation from its own.
        seed = (self.config.run.seed * 1_000_003 + self.step) * 4096 + self.world.rank
        torch.manual_seed(seed % 2**63)
        generator = torch.Generator().manual_seed(seed % 2**63)
        images = to_unit(images.to(device, non_blocking=True))
        images = normalise(self.augment(images, generator))
        if self.config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        lr = self.lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config, device):
            total, class_term, pair_term, features = parallel(
                images,
                labels,
                None if self.memory is None else (self.memory.features, self.memory.labels),
                self._has_pairs(self.step),
            )
            if self.head is not None:
                class_term = self.head(features, labels)
                total = total + self.config.loss.class_weight * class_term
        self.scaler.scale(total).backward()
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            clip(self.config, self.backbone, self.loss, self.head)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.memory is not None:  # after backward, which may still read what is replaced
            self.memory.update(features.detach(), labels)
        return torch.stack([t.detach().float() for t in (total, class_term, pair_term)])

    def threshold(self) -> float | None:
        """The unified cosine threshold, the pair loss's if it has one; None without any."""
        return first_threshold(self.loss.pair_loss, self.loss.class_loss, self.head)

    def _log(self, meter: _Meter, log: MetricsLog | None, bar: Any) -> None:
        total, class_term, pair_term, images_per_s = meter.take()
        if not math.isfinite(total):
            raise DivergedError(
                f"the loss is {total} at step {self.step}; try a smaller train.lr"
                + (" or train.amp=none" if self.config.train.amp != "none" else "")
            )
        threshold = self.threshold()
        shown = "-" if threshold is None else f"{threshold:.3f}"
        bar.set_postfix_str(f"loss {total:.3f}, b/s {shown}, {images_per_s:.0f} images/s")
        if log is not None:
            log.write(
                {
                    "step": self.step,
                    "epoch": self.step / self.steps_per_epoch,
                    "loss": total,
                    "class_loss": None if self.config.loss.class_name == NO_LOSS else class_term,
                    "pair_loss": pair_term if self._has_pairs(self.step - 1) else None,
                    "threshold": threshold,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "images_per_s": round(images_per_s, 2),
                }
            )


def freeze_bn(backbone: nn.Module) -> None:
    """Batch normalisation by the stored statistics; weight and bias still learn."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class _Meter:
    """Losses averaged since the last log line, kept on the device until asked for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._restart()

    def _restart(self) -> None:
        self.sum: Tensor | None = None
        self.steps = self.images = 0
        self.start = time.perf_counter()

    def add(self, terms: Tensor, images: int) -> None:
        self.sum = terms if self.sum is None else self.sum + terms
        self.steps += 1
        self.images += images

    def take(self) -> tuple[float, float, float, float]:
        """Total, class and pair loss averaged over steps and processes; images/s of all."""
        assert self.sum is not None
        total, class_term, pair_term = self.world.mean(self.sum / self.steps).tolist()
        speed = self.images * self.world.size / (time.perf_counter() - self.start)
        self._restart()
        return total, class_term, pair_term, speed
