"""The steps of a run, and what follows each: log, save, evaluate, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

from train.distributed import Vote
from train.errors import DivergedError
from train.evaluation.during import Evaluator
from train.losses import NO_LOSS, set_epoch
from train.meter import Averages, Meter
from train.run_folder import MetricsLog, evaluated_steps
from train.stopping import StoppedError, took

if TYPE_CHECKING:
    from train.engine import Trainer


class Loop:
    """A context manager around the files of figures, for :meth:`run` once."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        stop: Callable[[int], int],
        evaluator: Evaluator | None,
    ) -> None:
        self.trainer, self.folder, self.stop, self.evaluator = trainer, folder, stop, evaluator
        self.run_config, world = trainer.config.run, trainer.world
        self.vote = Vote(world, trainer.config.train.timeout_s)
        self.meter = Meter(world)
        self.cut_off = 0  # the signal in the middle of an evaluation
        self.log: MetricsLog | None = None
        if world.is_main:
            self.log = MetricsLog(
                folder, tensorboard=self.run_config.tensorboard, first_step=trainer.step + 1
            )
        self.bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.step,
            unit="step",
            disable=not (self.run_config.progress and world.is_main),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()

    def run(self) -> int:
        """To the end, or until the stop that it returns."""
        trainer = self.trainer
        update = trainer.update()
        try:
            self._catch_up()
        except StoppedError as stopped_in:
            self.cut_off = stopped_in.number
            return self.cut_off
        self.meter.restart_clock()
        while not trainer.at_end:
            for losses in (trainer.loss, trainer.head):
                if losses is not None:
                    set_epoch(losses, trainer.course.place(trainer.step)[0])
            start = time.monotonic()
            for images, labels in trainer.epoch_batches():
                pairs = trainer.has_pairs(trainer.step)
                row = update(images, labels, step=trainer.step, lr=trainer.lr(), pairs=pairs)
                if trainer.ema is not None and update.stepped:
                    trainer.ema.update_parameters(trainer.backbone)
                trainer.step += 1
                self.bar.update()
                self.meter.add(row, len(labels))
                stopped = self.vote(int(self.stop(trainer.step)))
                took(time.monotonic() - start)
                self._end_step(stopped)
                stopped = stopped or self.cut_off
                start = time.monotonic()
                if stopped:
                    self.vote.finish()
                    return stopped
        self.vote.finish()
        return 0

    def _catch_up(self) -> None:
        """The evaluation that a run which was cut off did not come to the end of."""
        trainer, evaluator = self.trainer, self.evaluator
        if evaluator is None or not trainer.step or not evaluator.due(trainer.step, trainer.at_end):
            return
        if not trainer.world.from_main(lambda: trainer.step in evaluated_steps(self.folder)):
            self._evaluate(evaluator)

    def _end_step(self, stopped: int) -> None:
        trainer, run = self.trainer, self.run_config
        epochs, within = trainer.course.place(trainer.step)
        saving = bool(stopped) or trainer.at_end or (within == 0 and epochs % run.save_every == 0)
        saving = saving or (run.save_steps > 0 and trainer.step % run.save_steps == 0)
        # A stop may not wait for long: the next run evaluates instead.
        evaluator = self.evaluator if trainer.at_end or not stopped else None
        evaluating = evaluator is not None and evaluator.due(trainer.step, trainer.at_end)
        if trainer.step % run.log_every == 0 or within == 0 or saving or evaluating:
            self._write(self.meter.take())
        if saving:
            start = time.monotonic()
            trainer.save(self.folder)
            took(time.monotonic() - start)
        if evaluator is not None and evaluating:
            try:
                self._evaluate(evaluator)
            except StoppedError as stopped_in:  # the next run evaluates instead
                self.cut_off = stopped_in.number
                if not saving:
                    trainer.save(self.folder)
        if saving or evaluating:
            self.meter.restart_clock()

    def _evaluate(self, evaluator: Evaluator) -> None:
        """Every process calls. What is written last says that all of it is done."""
        trainer = self.trainer
        figures = evaluator.figures(trainer.evaluated, trainer.threshold(), trainer.step)
        value, name = evaluator.value(figures), trainer.config.eval.best
        if value is not None:
            best = trainer.best if trainer.best and trainer.best["figure"] == name else None
            # The same step: a process died before it had kept its checkpoint.
            if best is None or value > best["value"] or trainer.step == best["step"]:
                trainer.best = {"figure": name, "value": value, "step": trainer.step}
                trainer.save(self.folder, best=True)
        if self.log is not None:
            for line in evaluator.lines(figures, trainer.step):
                tqdm.write(line)  # above the bar
            epoch = trainer.course.epochs(trainer.step)
            self.log.write_evaluation(trainer.step, epoch, figures)

    def _write(self, averages: Averages) -> None:
        trainer, bad = self.trainer, averages.bad
        if not math.isfinite(averages.total):
            step = trainer.step - (bad.steps_ago if bad else 0)
            loss = bad.losses[0] if bad else averages.total
            raise DivergedError(
                trainer.diagnosis(f"the loss is {loss} at step {step}", str(bad) if bad else "")
            )
        threshold, speed = trainer.threshold(), averages.images_per_s
        shown = "-" if threshold is None else f"{threshold:.3f}"
        self.bar.set_postfix_str(f"loss {averages.total:.3f}, b/s {shown}, {speed:.0f} images/s")
        if self.log is not None:
            has_pairs, loss = trainer.has_pairs(trainer.step - 1), trainer.config.loss
            has_classes = loss.class_name != NO_LOSS
            has_classes = has_classes and not (loss.class_until_filled and has_pairs)
            self.log.write(
                {
                    "step": trainer.step,
                    "epoch": trainer.course.epochs(trainer.step),
                    "loss": averages.total,
                    "class_loss": averages.class_term if has_classes else None,
                    "pair_loss": averages.pair_term if has_pairs else None,
                    "threshold": threshold,
                    "lr": trainer.optimizer.param_groups[0]["lr"],
                    "images_per_s": round(speed, 2),
                }
            )
