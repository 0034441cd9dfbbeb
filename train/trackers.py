"""Metrics for TensorBoard (``run.tensorboard``) and Weights & Biases (``run.wandb``)."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config import Config, to_dict
from train.errors import UserError


def check_installed(config: Config) -> None:
    """An error that says what to install, before anything else takes time."""
    asked = {"tensorboard": config.run.tensorboard, "wandb": bool(config.run.wandb)}
    for name, wanted in asked.items():
        spec = importlib.util.find_spec(name) if wanted else None
        # A folder of that name, such as the one that wandb leaves behind, has no origin.
        if wanted and (spec is None or spec.origin is None):
            without = "run.tensorboard=false" if name == "tensorboard" else "leave it out"
            raise UserError(
                f"run.{name}: the package {name} is not installed; pip install {name}, or {without}"
            )


def open_trackers(config: Config, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers of the configuration; metrics from ``first_step`` on will be added."""
    found: list[Tracker] = []
    if config.run.tensorboard:
        found.append(TensorBoard(folder, first_step))
    if config.run.wandb:
        found.append(WeightsAndBiases(config, folder))
    return found


def numbers(values: Mapping[str, Any], group: str) -> Iterator[tuple[str, float]]:
    """Numbers of a nested mapping by their paths; the step itself and what is None are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{group}/{name}")
        elif name != "step" and value is not None:
            yield f"{group}/{name}", value


class TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step, by names such as ``train/loss``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project ``run.wandb``; a resumed training continues it.

    Mode and entity are set by wandb's own variables: WANDB_MODE=offline, WANDB_ENTITY.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        own = folder / "wandb" / "run_id"
        try:
            own.parent.mkdir(exist_ok=True)
            if not own.exists():
                own.write_text(uuid.uuid4().hex[:12])
            self._run: Any = wandb.init(
                project=config.run.wandb,
                name=folder.resolve().name,
                id=own.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=to_dict(config),
                settings=wandb.Settings(console="off"),  # which would take over the progress bar
            )
        except Exception as error:  # of its server, its settings or its files
            raise UserError(f"run.wandb={config.run.wandb}: {error}") from error
        # wandb's own count cannot go back, as a run resumed from an earlier checkpoint does.
        self._run.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases
