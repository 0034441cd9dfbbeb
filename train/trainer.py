"""A training run: what it is made of, its state, and its steps.

Every random number is a function of (seed, step, rank) and the learning rate one of the step, so
the state of a run is its step and its tensors: a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unitsface_kernels as uk
from train import checkpoint
from train.config import Config, to_dict
from train.data.identities import Identities, check_names, pack_names
from train.data.loader import ImageSource
from train.data.sampler import epoch_order, rank_batches
from train.distributed import DistributedEnv, Vote
from train.divergence import ScaleWatch
from train.errors import DivergedError, UserError
from train.evaluation.during import Evaluator
from train.losses import (
    build_head,
    build_loss,
    first_threshold,
    learned_numbers,
    set_epoch,
    shards_classes,
    try_loss,
)
from train.meter import Meter, all_finite, scale_of
from train.optimizer import build_optimizer, build_scaler
from train.progress import Progress
from train.resuming import check_resumable, resumed_course
from train.run_folder import MetricsLog, evaluated_steps
from train.schedule import Course
from train.stopping import StoppedError, requested, took
from train.trackers import open_trackers
from train.train_step import BackboneAndLoss, TrainStep


class Trainer:
    """One training run of one process. ``fit`` may be called once."""

    # Set by ``fit``: the folder of the run, and on the first process the files of its metrics.
    folder: Path
    evaluator: Evaluator | None
    log: MetricsLog | None = None
    bar: Progress

    def __init__(self, config: Config, world: DistributedEnv, source: ImageSource) -> None:
        self.config, self.world, self.source = config, world, source
        self.people = Identities.of(source.images)
        train, model, identities = config.train, config.model, len(source.images.identities)
        self.course = Course(train, len(source.images))
        self.step = 0
        images = self.course.batch // world.size
        if images // train.accumulate < 2:
            raise UserError(
                f"train.accumulate={train.accumulate} parts of a process's {images} images: "
                "BatchNorm needs 2 in each"
            )

        torch.manual_seed(config.run.seed)  # the same initial weights on every process
        self.backbone = model.build()
        sharded = shards_classes(config.loss, config.partial_fc, world.size)
        counts, size = torch.from_numpy(self.people.counts), model.embedding_size
        given = {"counts": counts, "sharded": sharded, "group": world.group}
        self.loss = build_loss(config.loss, identities, size, **given)
        self.head: uk.PartialFC | None = None
        if sharded:
            self.head = build_head(config, identities, device=world.device, counts=counts)
        self.module = BackboneAndLoss(self.backbone, self.loss).to(world.device)
        # Not part of the module: data-parallel training would broadcast it at every step, and it
        # is the same on every process anyway.
        self.memory: uk.FeatureMemory | None = None
        if config.loss.memory:
            self.memory = uk.FeatureMemory(identities, size).to(world.device)
        try_loss(self.loss, size, world.device, self.head)
        if model.channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(config, self.backbone, self.loss, self.head)
        self.scaler = build_scaler(config, world)
        self.watch = ScaleWatch(self.scaler, world)
        self.meter = Meter(world)
        self.ema: AveragedModel | None = None
        if train.ema:
            average = get_ema_multi_avg_fn(train.ema)
            self.ema = AveragedModel(self.backbone, multi_avg_fn=average, use_buffers=True)
        if train.compile:
            self.backbone.compile()  # in place: names in the state dict stay as they are
        self.best: dict[str, Any] | None = None  # figure, value, step
        self.saved_step: int | None = None
        self.stopped_by = 0  # the signal
        if world.device.type == "cuda":
            torch.backends.cudnn.deterministic = config.run.deterministic
            torch.backends.cudnn.benchmark = not config.run.deterministic

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

    def threshold(self) -> float | None:
        """The unified cosine threshold, the pair loss's if it has one; None without any."""
        return first_threshold(self.loss.pair_loss, self.loss.class_loss, self.head)

    # -- state ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All there is, but for what is in shards and its optimizer."""
        epoch, done = self.course.place(self.step)
        values = {
            "format": checkpoint.FORMAT,
            "config": to_dict(self.config),
            "identities": pack_names(self.source.images.identities),
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
        if self.head is not None:
            path = folder / checkpoint.LAST_SHARDED
            checkpoint.save_sharded(self.state(), path, self.head, self.optimizer)
        else:
            path = folder / checkpoint.LAST
            if self.world.is_main:
                checkpoint.save_atomically(self.state(), path)
        self.saved_step = self.step
        if self.world.is_main:
            checkpoint.keep(path, self.step, self.config.run.keep, best=best)

    def load_backbone(self, values: Any, path: Path) -> None:
        """Begin with the backbone of a file, its averaged weights where it has some."""
        checkpoint.load_backbone(
            self.backbone, values, path=path, config=self.config, averaged=True
        )
        if self.ema is not None:
            self.ema.module.load_state_dict(self.backbone.state_dict())

    def load_state(self, values: dict[str, Any], path: Path) -> None:
        config, sharded = self.config, self.head is not None
        checkpoint.load_backbone(self.backbone, values, path=path, config=config)
        check_names(values["identities"], self.source.images.identities, path)
        check_resumable(values, path, config, [*self.loss.state_dict()], sharded=sharded)
        checkpoint.load_module(self.loss, values["loss"], what="loss", path=path)
        if self.memory is not None:
            checkpoint.load_module(self.memory, values["memory"], what="memory", path=path)
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        if self.head is not None:
            checkpoint.load_sharded(path, self.head, self.optimizer)
        else:
            checkpoint.load_optimizer(self.optimizer, values["optimizer"], path)
        # The state is the checkpoint's; weight decay and the like are the present configuration's.
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if values["scaler"]:  # empty where the run was not in float16
            checkpoint.load_module(self.scaler, values["scaler"], what="gradient scaler", path=path)
        self.course = resumed_course(values, path, config, len(self.source.images))
        self.step = self.saved_step = self.course.begin
        self.best = values["trainer"].get("best")
        if self.ema is not None and values.get("ema") is None:
            self.ema.module.load_state_dict(self.backbone.state_dict())  # it begins with them
        elif self.ema is not None:
            checkpoint.load_backbone(self.ema.module, values["ema"], path=path, config=config)
            self.ema.n_averaged.fill_(self.step)  # not the first one, which would start it anew

    # -- steps ------------------------------------------------------------------------------

    def fit(
        self,
        folder: Path,
        stop: Callable[[int], int] = lambda step: requested(),
        evaluator: Evaluator | None = None,
    ) -> bool:
        """Train to the end, or until ``stop(step)`` of a process is not 0. True at the end.

        Either way the last checkpoint is that of the last step done. The number that ``stop``
        returned, on any process, is ``stopped_by``; by default it is a signal's.
        """
        world, run, self.folder, self.evaluator = self.world, self.config.run, folder, evaluator
        vote = Vote(world, self.config.train.timeout_s)
        with ExitStack() as files:
            shown = run.progress and world.is_main
            self.bar = Progress(self.total_steps, self.step, enabled=shown)
            files.enter_context(closing(self.bar))
            world.from_main(lambda: self._open_log(files))
            train_step = self.build_step()
            cut_off = self._catch_up()
            self.meter.restart_clock()
            while not self.at_end and not cut_off and not self.stopped_by:
                for losses in (self.loss, self.head):
                    if losses is not None:
                        set_epoch(losses, self.course.place(self.step)[0])
                start = time.monotonic()
                for images, labels in self.meter.clock.waiting(self.epoch_batches()):
                    lr, pairs = self.course.lr(self.step), self.has_pairs(self.step)
                    row = train_step(images, labels, step=self.step, lr=lr, pairs=pairs)
                    self.step += 1
                    self.bar.update()
                    self.meter.add(row, len(labels))
                    self.stopped_by = vote(int(stop(self.step)))
                    took(time.monotonic() - start)
                    cut_off = self._end_step(self.stopped_by)
                    if self.stopped_by or cut_off:
                        break
                    start = time.monotonic()
            vote.finish()
        self.stopped_by = self.stopped_by or cut_off
        return self.at_end and not cut_off

    def _open_log(self, files: ExitStack) -> None:
        trackers = open_trackers(self.config, self.folder, self.step + 1)
        self.log = files.enter_context(closing(MetricsLog(self.folder, trackers)))

    def build_step(self) -> TrainStep:
        parts = self.module, self.head, self.memory, self.ema, self.optimizer, self.scaler
        return TrainStep(self.config, self.world, *parts, self.watch, self.meter.clock)

    def epoch_batches(self) -> Any:
        """The batches of the current epoch that are still to come."""
        epoch, done = self.course.place(self.step)
        batch_size = self.config.train.batch_size
        order = epoch_order(
            self.source.images.labels,
            seed=self.config.run.seed,
            epoch=epoch,
            images_per_identity=self.config.data.images_per_identity,
            sampler=self.config.data.sampler,
            batch_size=batch_size,
        )
        rank, size = self.world.rank, self.world.size
        batches = rank_batches(order[done:], batch_size=batch_size, rank=rank, world_size=size)
        return self.source.batches(batches[: self.total_steps - self.step])

    def has_pairs(self, step: int) -> bool:
        """True where the pair loss takes part in this step, counted from 0."""
        filling = self.memory is not None and self.course.place(step)[0] == 0
        return self.loss.pair_loss is not None and not filling

    # -- between steps: log, save, evaluate -------------------------------------------------

    def _catch_up(self) -> int:
        """The evaluation that a run which was cut off did not come to the end of; the signal that
        ended it once more.
        """
        due = self.step and self.evaluator and self.evaluator.due(self.step, self.at_end)
        if due and not self.world.from_main(lambda: self.step in evaluated_steps(self.folder)):
            return self._evaluate()
        return 0

    def _end_step(self, stopped: int) -> int:
        """All that follows a step; the signal that ended an evaluation, which the next run does."""
        run, evaluator = self.config.run, self.evaluator
        epochs, within = self.course.place(self.step)
        saving = bool(stopped) or self.at_end or (within == 0 and epochs % run.save_every == 0)
        saving = saving or (run.save_steps > 0 and self.step % run.save_steps == 0)
        # A stop may not wait for long: the next run evaluates instead.
        evaluating = evaluator is not None and (self.at_end or not stopped)
        evaluating = evaluating and evaluator.due(self.step, self.at_end)
        if self.step % run.log_every == 0 or within == 0 or saving or evaluating:
            self._log_metrics()
        if saving:
            start = time.monotonic()
            self.save(self.folder)
            took(time.monotonic() - start)
        cut_off = self._evaluate() if evaluating else 0
        if cut_off and not saving:
            self.save(self.folder)
        if saving or evaluating:
            self.meter.restart_clock()
        return cut_off

    def _evaluate(self) -> int:
        """Every process calls. The line that is written last marks it as complete."""
        assert self.evaluator is not None
        try:
            metrics = self.evaluator.evaluate(self.evaluated, self.threshold(), self.step)
        except StoppedError as stopped:
            return stopped.number
        value, name = self.evaluator.value(metrics), self.config.eval.best
        if value is not None:
            best = self.best if self.best and self.best["figure"] == name else None
            # The same step: a process died before it had kept its checkpoint.
            if best is None or value > best["value"] or self.step == best["step"]:
                self.best = {"figure": name, "value": value, "step": self.step}
                self.save(self.folder, best=True)
        if self.log is not None:
            for line in self.evaluator.lines(metrics, self.step):
                self.bar.write(line)
            self.log.write_evaluation(self.step, self.course.epochs(self.step), metrics)
        return 0

    def _log_metrics(self) -> None:
        averages = self.meter.take()
        if not math.isfinite(averages.total):
            bad = averages.bad
            step = self.step - (bad.steps_ago if bad else 0)
            loss = bad.losses[0] if bad else averages.total
            raise DivergedError(
                self.diagnosis(f"the loss is {loss} at step {step}", str(bad) if bad else "")
            )
        threshold, scaling = self.threshold(), self.watch.take()
        shown = "-" if threshold is None else f"{threshold:.3f}"
        self.bar.set_postfix_str(f"loss {averages.total:.3f}, b/s {shown}, {averages.speed}")
        if self.log is not None:
            has_pairs = self.has_pairs(self.step - 1)
            learned = learned_numbers(self.loss, self.head)
            self.log.write(
                {
                    "step": self.step,
                    "epoch": self.course.epochs(self.step),
                    **averages.losses(self.config.loss, has_pairs=has_pairs),
                    "threshold": threshold,
                    **({"learned": learned} if learned else {}),
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "images_per_s": round(averages.images_per_s, 2),
                    **averages.times,
                    **scaling,
                }
            )

    def diagnosis(self, what: str, where: str = "") -> str:
        """One line on a run that has diverged; every process calls."""
        advice = "" if self.config.train.amp == "none" else " or train.amp=none"
        scales = scale_of(self.loss.class_loss, self.head, self.loss.pair_loss)
        numbers = f"scale {scales}, lr {self.optimizer.param_groups[0]['lr']:g}"
        if self.scaler.is_enabled():
            numbers += f", gradients scaled by {self.scaler.get_scale():g}"
        kept = f"the last checkpoint, of step {self.saved_step}, is kept"
        parts = [f"{what}; try a smaller train.lr{advice}", where, self.watch.not_finite(), numbers]
        return "; ".join([*filter(None, parts), *([] if self.saved_step is None else [kept])])
