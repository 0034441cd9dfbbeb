"""Learning-rate factor as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config.sections import TrainConfig

SCHEDULES = ("constant", "polynomial", "cosine", "step")


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
    """Of ``step``, from 0, with what a configuration gives in epochs."""
    return train.lr * lr_factor(
        step,
        total_steps,
        schedule=train.schedule,
        warmup_steps=math.ceil(train.warmup_epochs * steps_per_epoch),
        power=train.power,
        milestones=[math.ceil(m * steps_per_epoch) for m in train.milestones],
        gamma=train.gamma,
    )
