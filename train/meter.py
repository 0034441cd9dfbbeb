"""Averages over the steps since the last log line, and checks that numbers are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.config.sections import NO_LOSS, LossConfig
from train.distributed import DistributedEnv
from train.step_clock import StepClock


@dataclass(frozen=True)
class BadStep:
    """The first step whose losses were not finite."""

    steps_ago: int
    rank: int  # the first of the processes that saw it
    losses: tuple[float, ...]  # total, class, pair
    norm: float  # largest of a feature there
    norm_before: float | None  # one step earlier, if that is known

    def __str__(self) -> str:
        before = "" if self.norm_before is None else f" ({self.norm_before:g} one step before)"
        return (
            f"first on process {self.rank}: class loss {self.losses[1]:g}, pair loss "
            f"{self.losses[2]:g}, largest feature norm {self.norm:g}{before}"
        )


@dataclass(frozen=True)
class Averages:
    """Over the steps and processes."""

    total: float
    class_term: float
    pair_term: float
    images_per_s: float  # of all processes
    bad: BadStep | None
    times: dict[str, float]  # milliseconds of a step on this process, by part
    step_ms: float

    def losses(self, config: LossConfig, *, has_pairs: bool) -> dict[str, float | None]:
        """None for a term that the last step did not have."""
        has_classes = config.class_name != NO_LOSS
        has_classes = has_classes and not (config.class_until_filled and has_pairs)
        return {
            "loss": self.total,
            "class_loss": self.class_term if has_classes else None,
            "pair_loss": self.pair_term if has_pairs else None,
        }

    @property
    def speed(self) -> str:
        """Images per second, and the share of the time spent waiting for batches from 5 % on."""
        share = self.times["data_ms"] / self.step_ms
        waiting = f", {share:.0%} waiting for data" if share >= 0.05 else ""
        return f"{self.images_per_s:.0f} images/s{waiting}"


class Meter:
    """Losses since the last log line, kept on the device until :meth:`take`."""

    def __init__(self, world: DistributedEnv) -> None:
        self.world = world
        self.clock = StepClock(world.device)
        self._restart()

    def _restart(self) -> None:
        self.rows: list[Tensor] = []  # of a step each
        self.sum: Tensor | None = None
        self.images = 0
        self.start = time.perf_counter()

    def add(self, row: Tensor, images: int) -> None:
        """[total, class, pair, largest feature norm] of a step of this process."""
        self.rows.append(row)
        self.sum = row[:3] if self.sum is None else self.sum + row[:3]
        self.images += images

    def restart_clock(self) -> None:
        """Leave out the time since :meth:`take`, that of a checkpoint or an evaluation."""
        self.start = time.perf_counter()

    def take(self) -> Averages:
        """Every process calls."""
        assert self.sum is not None
        means = self.world.mean(self.sum / len(self.rows)).tolist()
        seconds = time.perf_counter() - self.start
        # The numbers above have come from the device: it is at the end of these steps.
        times = self.clock.take()
        speed, step_ms = self.images * self.world.size / seconds, seconds * 1e3 / len(self.rows)
        # The sum over processes is finite on all of them, or on none.
        bad = None if math.isfinite(means[0]) else self._first_bad()
        self._restart()
        return Averages(*means, speed, bad, times, step_ms)

    def _first_bad(self) -> BadStep | None:
        every = self.world.gather_objects(torch.stack(self.rows).tolist())
        for k in range(len(self.rows)):
            for rank, rows in enumerate(every):
                if not math.isfinite(rows[k][0]):
                    before = rows[k - 1][3] if k else None
                    ago = len(self.rows) - 1 - k
                    return BadStep(ago, rank, tuple(rows[k][:3]), rows[k][3], before)
        return None  # finite losses whose sum is not


def all_finite(modules: Iterable[nn.Module | None], world: DistributedEnv) -> bool:
    """True where weights and statistics are finite on all processes; every one calls."""
    flags = [
        torch.stack(torch.aminmax(tensor.detach())).isfinite().all()  # without a copy's memory
        for module in modules
        if module is not None
        for tensor in [*module.parameters(), *module.buffers()]
        if tensor.is_floating_point() and tensor.numel()
    ]
    bad = torch.stack(flags).logical_not().any().float()
    return float(world.mean(bad)) == 0.0


def scale_of(*losses: nn.Module | None) -> str:
    """Scales of the losses' logits, for messages."""
    found = [
        f"{float(torch.as_tensor(module.scale).detach()):g} ({type(module).__name__})"
        for loss in losses
        if loss is not None
        for module in loss.modules()
        if isinstance(getattr(module, "scale", None), int | float | Tensor)
        # A user's formula may have one per identity.
        and torch.as_tensor(module.scale).numel() == 1
    ]
    return ", ".join(dict.fromkeys(found)) or "none"
