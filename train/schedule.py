"""The epoch and the learning rate at a step: functions of the step alone, so that resuming needs no
state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.config.sections import SCHEDULES, TrainConfig
from train.data.sampler import steps_per_epoch


def lr_factor(
    step: float,
    total_steps: float,
    *,
    schedule: str,
    warmup_steps: int = 0,
    power: float = 2.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """Factor of the peak learning rate at ``step`` (from 0) of ``total_steps``.

    Warm-up rises linearly and reaches 1 at its last step. The decays start after it; polynomial
    and cosine would reach 0 at ``total_steps``, one past the last step. ``milestones`` are steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return gamma ** sum(step >= milestone for milestone in milestones)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = min(1.0, progress)
    if schedule == "polynomial":
        return (1.0 - progress) ** power
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")


def learning_rate(
    train: TrainConfig, step: float, total_steps: float, steps_per_epoch: int
) -> float:
    """The learning rate of ``step``, from 0, with what a configuration gives in epochs."""
    return train.lr * lr_factor(
        step,
        total_steps,
        schedule=train.schedule,
        warmup_steps=math.ceil(train.warmup_epochs * steps_per_epoch),
        power=train.power,
        milestones=[math.ceil(m * steps_per_epoch) for m in train.milestones],
        gamma=train.gamma,
    )


@dataclass(frozen=True)
class Course:
    """A run of ``train`` over ``images``, from the place where it began or was resumed.

    Epochs are counted in images, so that a run goes on with the next image where the size of its
    batches changes; whatever depends on the epoch follows. A resumed run has the course of one
    that was not cut off, to the last bit of its learning rates.
    """

    train: TrainConfig
    images: int
    begin: int = 0  # step
    epoch: int = 0  # of that step
    done: int = 0  # images of that epoch before it

    @property
    def batch(self) -> int:
        return min(self.train.batch_size, self.images)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.images, self.train.batch_size)

    @property
    def total_steps(self) -> int:
        epochs = self.train.epochs - self.epoch - 1
        total = self.begin + self._rest + epochs * self.steps_per_epoch
        return min(total, self.train.max_steps) if self.train.max_steps else total

    @property
    def _rest(self) -> int:
        """Steps of the epoch that it began in."""
        return max(0, self.images - self.done) // self.batch

    def place(self, step: int) -> tuple[int, int]:
        """Epoch, and images of it before ``step``."""
        steps = step - self.begin
        if steps < self._rest:
            return self.epoch, self.done + steps * self.batch
        epochs, within = divmod(steps - self._rest, self.steps_per_epoch)
        return self.epoch + 1 + epochs, within * self.batch

    def epochs(self, step: int) -> float:
        """Epochs before ``step``; fractions are of their whole batches."""
        return self._steps(step) / self.steps_per_epoch

    def _steps(self, step: int) -> float:
        """Steps at the present size of batches from the first image to ``step``, for schedules."""
        epoch, done = self.place(step)
        return (epoch * self.steps_per_epoch * self.batch + done) / self.batch

    def lr(self, step: int) -> float:
        """Learning rate of ``step``, from 0."""
        return learning_rate(
            self.train, self._steps(step), self._steps(self.total_steps), self.steps_per_epoch
        )
