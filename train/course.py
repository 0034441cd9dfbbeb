"""Where in its epochs a run is at a step, and the learning rate there."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.sections import TrainConfig
from train.data.sampler import steps_per_epoch
from train.schedule import learning_rate


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
