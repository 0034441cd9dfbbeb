"""A training run: what it is made of, and its state.

Every random number is a function of (seed, step, rank) and the learning rate one of the step, so
the state of a run is its step and its tensors: a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unitsface_kernels as uk
from train import checkpoint
from train.backbones import build_backbone
from train.checkpoints import keep_best, keep_last
from train.config import Config, to_dict
from train.course import Course
from train.data.identities import Identities
from train.data.loader import ImageSource
from train.data.sampler import epoch_order, rank_batches
from train.distributed import World
from train.errors import DivergedError, UserError
from train.evaluation.during import Evaluator
from train.loop import Loop
from train.losses import (
    NO_LOSS,
    build_head,
    build_loss,
    first_threshold,
    shards_classes,
    try_head,
    try_loss,
)
from train.meter import all_finite, scale_of
from train.optimizer import build_optimizer, build_scaler
from train.resuming import check_losses, check_model, resumed_course
from train.step import TrainStep, Update, fix_gradient_order, freeze_bn


class Trainer:
    """One training run of one process. ``fit`` may be called once."""

    def __init__(
        self, config: Config, world: World, source: ImageSource, *, load_weights: bool = True
    ) -> None:
        self.config, self.world, self.source = config, world, source
        self.people = Identities.of(source.images)
        train = config.train
        self.course = Course(train, len(source.images))
        self.step = 0
        images = min(train.batch_size, len(source.images)) // world.size
        if images // train.accumulate < 2:
            raise UserError(
                f"train.accumulate={train.accumulate} parts of a process's {images} images: "
                "BatchNorm needs 2 in each"
            )

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
            path, state = checkpoint.read_any(Path(config.model.weights))
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
        self.ema: AveragedModel | None = None
        if train.ema:
            average = get_ema_multi_avg_fn(train.ema)
            self.ema = AveragedModel(self.backbone, multi_avg_fn=average, use_buffers=True)
        if train.compile:
            self.backbone.compile()  # in place: names in the state dict stay as they are
        self.best: dict[str, Any] | None = None  # figure, value, step
        self.saved_step: int | None = None
        self.stopped_by = 0
        if world.device.type == "cuda":
            torch.backends.cudnn.deterministic = config.run.deterministic
            torch.backends.cudnn.benchmark = not config.run.deterministic

    # -- state ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All there is, but for what is in shards and its optimizer."""
        epoch, done = self.course.place(self.step)
        values = {
            "format": checkpoint.FORMAT,
            "config": to_dict(self.config),
            "identities": checkpoint.pack_names(self.source.images.identities),
            "backbone": self.backbone.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "loss": self.loss.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images": torch.from_numpy(self.people.counts),
            "processes": self.world.size,
            "trainer": {
                "step": self.step,
                "epoch": epoch,
                "images": done,  # of that epoch, before the next step
                "threshold": self.threshold(),
                "best": self.best,
            },
        }
        return values if self.head else {**values, "optimizer": self.optimizer.state_dict()}

    def save(self, folder: Path, *, best: bool = False) -> None:
        """The last checkpoint of a run folder, and the best if it is; every process calls."""
        if not all_finite((self.module, self.head), self.world):
            raise DivergedError(self.diagnosis(f"weights are not finite after step {self.step}"))
        sharded = self.head is not None
        path = folder / (checkpoint.LAST_SHARDED if sharded else checkpoint.LAST)
        if self.head is not None:
            checkpoint.save_sharded(self.state(), path, self.head, self.optimizer)
        elif self.world.is_main:
            checkpoint.save_atomically(self.state(), path)
        self.saved_step = self.step
        if self.world.is_main:
            keep_last(path, self.step, self.config.run.keep)
            if best:
                keep_best(path)

    def load_state(self, values: dict[str, Any], path: Path) -> None:
        checkpoint.load_backbone(self.backbone, values, path=path, config=self.config)
        checkpoint.check_names(values["identities"], self.source.images.identities, path)
        held = values["config"].get("train", {}).get("optimizer", "sgd")
        if held != self.config.train.optimizer:
            raise UserError(
                f"{path} holds the state of {held}; leave train.optimizer as it was, or begin a "
                "run with its weights as model.weights"
            )
        if checkpoint.is_sharded(path) != (self.head is not None):
            held = "shards of classes" if self.head is None else "no shards of classes"
            raise UserError(f"{path} holds {held}; leave partial_fc.enabled as it was")
        check_model(values, path, self.config)
        check_losses(values, path, self.config, list(self.loss.state_dict()))
        checkpoint.load_module(self.loss, values["loss"], what="loss", path=path)
        if self.memory is not None:
            if values.get("memory") is None:
                raise UserError(f"{path} was trained without loss.memory and holds none")
            checkpoint.load_module(self.memory, values["memory"], what="memory", path=path)
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        if self.head is not None:
            checkpoint.load_sharded(path, self.head, self.optimizer)
        else:
            checkpoint.load_optimizer(self.optimizer, values["optimizer"], path)
        # The state is the checkpoint's; weight decay and the like are what is asked for now.
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if values["scaler"]:  # empty where the run was not in float16
            checkpoint.load_module(self.scaler, values["scaler"], what="gradient scaler", path=path)
        self.course = resumed_course(values, path, self.config, len(self.source.images))
        self.step = self.saved_step = self.course.begin
        self.best = values["trainer"].get("best")
        if self.ema is not None and values.get("ema") is None:
            self.ema.module.load_state_dict(self.backbone.state_dict())  # it begins with them
        elif self.ema is not None:
            checkpoint.load_backbone(self.ema.module, values["ema"], path=path, config=self.config)
            self.ema.n_averaged.fill_(self.step)  # not the first one, which would start it anew

    # -- loop -------------------------------------------------------------------------------

    def fit(
        self,
        folder: Path,
        stop: Callable[[int], int] = lambda step: 0,
        evaluator: Evaluator | None = None,
    ) -> bool:
        """Train to the end, or until ``stop(step)`` of a process is not 0. True at the end.

        Either way the last checkpoint is that of the last step done. What ``stop`` said, on
        whichever process, is ``stopped_by``.
        """
        with Loop(self, folder, stop, evaluator) as loop:
            self.stopped_by = loop.run()
        return self.at_end and not loop.cut_off

    @property
    def steps_per_epoch(self) -> int:
        return self.course.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.course.total_steps

    @property
    def at_end(self) -> bool:
        return self.step >= self.total_steps

    @property
    def evaluated(self) -> nn.Module:
        """The backbone that is evaluated: the average over steps, if there is one."""
        return self.backbone if self.ema is None else self.ema.module

    def update(self) -> Update:
        parallel: nn.Module = self.module
        if self.world.size > 1:
            gpus = [self.world.device.index] if self.world.device.type == "cuda" else None
            parallel = DistributedDataParallel(self.module, device_ids=gpus)
            fix_gradient_order(parallel)
        parallel.train()
        if self.config.model.freeze_bn:
            freeze_bn(self.backbone)
        return Update(
            config=self.config,
            device=self.world.device,
            rank=self.world.rank,
            module=self.module,
            parallel=parallel,
            head=self.head,
            memory=self.memory,
            optimizer=self.optimizer,
            scaler=self.scaler,
        )

    def epoch_batches(self) -> Any:
        """The batches of the current epoch that are still to come."""
        epoch, done = self.course.place(self.step)
        order = epoch_order(
            self.source.images.labels,
            seed=self.config.run.seed,
            epoch=epoch,
            images_per_identity=self.config.data.images_per_identity,
            sampler=self.config.data.sampler,
            batch_size=self.config.train.batch_size,
        )
        batches = rank_batches(
            order[done:],
            batch_size=self.config.train.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        return self.source.batches(batches[: self.total_steps - self.step])

    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.course.lr(self.step)

    def has_pairs(self, step: int) -> bool:
        """Whether the pair loss takes part in this step, counted from 0."""
        filling = self.memory is not None and self.course.place(step)[0] == 0
        return self.loss.pair_loss is not None and not filling

    def threshold(self) -> float | None:
        """The unified cosine threshold, the pair loss's if it has one; None without any."""
        return first_threshold(self.loss.pair_loss, self.loss.class_loss, self.head)

    def diagnosis(self, what: str, where: str = "") -> str:
        """One line on a run that is no longer worth going on with."""
        amp = self.config.train.amp
        advice = "try a smaller train.lr" + (" or train.amp=none" if amp != "none" else "")
        scales = scale_of(self.loss.class_loss, self.head, self.loss.pair_loss)
        parts = [f"{what}; {advice}", *([where] if where else [])]
        parts.append(f"scale {scales}, lr {self.optimizer.param_groups[0]['lr']:g}")
        if self.scaler.is_enabled():
            parts[-1] += f", gradients scaled by {self.scaler.get_scale():g}"
        if self.saved_step is not None:
            parts.append(f"the last checkpoint, of step {self.saved_step}, is kept")
        return "; ".join(parts)
