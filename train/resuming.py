"""What a resumed run does otherwise than the one that wrote its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.config import Config, to_dict
from train.course import Course
from train.data.identities import Identities
from train.errors import UserError

_ORDER = "another order of images: what is left of this epoch repeats and leaves out some"
# What a change of a key does, by its name or its section; the first that fits.
_EFFECTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("train.batch_size",), "the epoch goes on behind the images it has had"),
    (
        (
            *("train.lr", "train.epochs", "train.max_steps", "train.schedule", "train.power"),
            *("train.warmup_epochs", "train.milestones", "train.gamma"),
        ),
        "learning rate and end of the run",
    ),
    (("run.seed", "data.sampler", "data.images_per_identity"), _ORDER),
    (("data.path", "data.holdout"), "the identities to train on are the same"),
    (("model.weights",), "none: the weights are the checkpoint's"),
    (("train.ema",), "the average begins with the weights where the checkpoint has none"),
    (
        (
            *("train.device", "train.compile", "loss.backend", "model.channels_last"),
            *("run.deterministic", "processes"),
        ),
        "rounding",
    ),
    (("eval.",), "what is evaluated, and which checkpoint is the best"),
    (
        ("run.", "data.workers", "data.cache", "data.num_", "data.duplicates", "train.timeout_s"),
        "none on what is trained",
    ),
    (("",), "from the next step on"),
)


# A run may have been moved; that classes are in shards where they were is checked at loading.
_CHECKED = ("run.dir", "partial_fc.enabled")


@dataclass(frozen=True)
class Difference:
    what: str
    held: Any
    asked: Any
    effect: str

    def __str__(self) -> str:
        return f"{self.what}: {_shown(self.held)}, now {_shown(self.asked)} ({self.effect})"


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text or "''"


def keys_that_differ(
    held: Mapping[str, Mapping[str, Any]], asked: Mapping[str, Mapping[str, Any]]
) -> list[Difference]:
    """Of two configurations as :func:`to_dict` gives them; the first may lack newer keys."""
    defaults = to_dict(Config())
    found = []
    for section, entries in asked.items():
        for name, value in entries.items():
            key = f"{section}.{name}"
            before = held.get(section, {}).get(name, defaults[section][name])
            if before != value and key not in _CHECKED:
                effect = next(text for keys, text in _EFFECTS if key.startswith(keys))
                found.append(Difference(key, before, value, effect))
    return found


def resumed_course(values: dict[str, Any], path: Path, config: Config, images: int) -> Course:
    """The rest of the run of a checkpoint, by the present configuration.

    Raises:
        UserError: its step lies behind the end of the run, or its place cannot be kept.
    """
    trainer, held = values["trainer"], values["config"]
    step = trainer["step"]
    if "epoch" in trainer:
        epoch, done = trainer["epoch"], trainer["images"]
    else:  # as earlier versions wrote it: batches had one size throughout
        size = held.get("train", {}).get("batch_size", Config().train.batch_size)
        batch = min(size, images)
        epoch, done = divmod(step, max(1, images // batch))
        done *= batch
    if not all(type(n) is int and n >= 0 for n in (step, epoch, done)):
        raise UserError(f"{path} is damaged: step {step}, epoch {epoch}, image {done}")
    course = Course(config.train, images, step, epoch, done)
    if step > course.total_steps:
        raise UserError(
            f"{path} is of step {step}, and this run has {course.total_steps} in all; "
            "for a longer run, set train.epochs or train.max_steps"
        )
    held_data, data = held.get("data", {}), config.data
    if done and data.sampler == "balanced":
        asked = (config.train.batch_size, data.images_per_identity, data.sampler)
        train = held.get("train", {})
        before = (train.get("batch_size"), held_data.get("images_per_identity"), "balanced")
        if asked != before or held_data.get("sampler") != "balanced":
            raise UserError(
                f"{path} is of the middle of an epoch, whose batches data.sampler=balanced makes "
                "for one train.batch_size and data.images_per_identity; leave them as they were, "
                "or resume from the end of an epoch"
            )
    return course


def check_losses(values: dict[str, Any], path: Path, config: Config, state: Sequence[str]) -> None:
    """An error where a loss would take over the state of another one.

    Args:
        state: names in the state of the present losses.
    """
    held, asked = values["config"].get("loss", {}), to_dict(config)["loss"]
    for part in ("class", "pair"):
        before = held.get(part, asked[part])
        names = [*values["loss"], *state]
        # What lies in shards is the class loss's.
        has_state = part == "class" or any(name.startswith("pair_loss.") for name in names)
        if before != asked[part] and has_state:
            raise UserError(
                f"{path} holds another loss, the state of loss.{part}={before}, not of "
                f"{asked[part]}; leave loss.{part} as it was, or begin a run with its weights as "
                "model.weights"
            )


def check_model(values: dict[str, Any], path: Path, config: Config) -> None:
    """An error where weights fit a backbone that they are not of."""
    before = values["config"].get("model", {}).get("name", config.model.name)
    if before != config.model.name:
        raise UserError(f"{path} holds {before}, not {config.model.name}")


def report(
    values: dict[str, Any],
    path: Path,
    config: Config,
    course: Course,
    identities: Identities,
    processes: int,
) -> str:
    """From which step a run goes on, what is the same, what differs and what that does."""
    held, asked = values["config"], to_dict(config)
    found = keys_that_differ(held, asked)
    number = values.get("processes", processes)
    if number != processes:
        found.append(Difference("processes", number, processes, "rounding"))
    counts = _counts(values)
    if counts is not None:
        before = Identities(identities.names, counts)
        text = before.difference(identities)
        if text:
            where = _ORDER if course.done else "from the next step on"
            found.append(Difference("images, in brackets now", text, "other ones", where))
    found += _learning_rate(held, asked, values, course)
    sections = {d.what.split(".")[0] for d in found}
    same = [name for name in asked if name not in sections and name != "run"]
    total = course.total_steps
    epochs = course.epochs(course.begin)
    lines = [f"resuming {path} at step {course.begin} of {total}, epoch {epochs:.2f}"]
    lines.append(f"the same: identities, {', '.join(same)}")
    lines += [f"differs: {difference}" for difference in found] or ["nothing differs"]
    if course.begin == total:
        lines.append("it is at its end: there is nothing left to train")
    return "\n  ".join(lines)


def _counts(values: dict[str, Any]) -> NDArray[np.int64] | None:
    """Images of each identity; earlier versions did not write them."""
    return np.asarray(values["images"]) if "images" in values else None


def _learning_rate(
    held: dict[str, Any], asked: dict[str, Any], values: dict[str, Any], course: Course
) -> list[Difference]:
    """Of the next step, where it is another than it would have been."""
    if course.begin >= course.total_steps:
        return []
    train = {**asked["train"], **held.get("train", {})}
    counts = _counts(values)
    before = Course(
        type(course.train)(**train),
        course.images if counts is None else int(counts.sum()),
        course.begin,
        course.epoch,
        course.done,
    )
    if before.begin >= before.total_steps:  # the run that was has ended
        return []
    old, new = before.lr(course.begin), course.lr(course.begin)
    if old == new:
        return []
    return [Difference("learning rate of the next step", old, new, "by the keys above")]
