"""Differences of a resumed run from the one that wrote its checkpoint: allowed, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.checkpoint import is_sharded
from train.config import Config, to_dict
from train.config.differences import OTHER_ORDER, Difference, keys_that_differ
from train.config.sections import TrainConfig
from train.data.identities import Identities
from train.errors import UserError
from train.schedule import Course


def resumed_course(values: dict[str, Any], path: Path, config: Config, images: int) -> Course:
    """The rest of the run of a checkpoint, by the present configuration.

    Raises:
        UserError: its step lies behind the end of the run, or its place cannot be kept.
    """
    trainer, held, asked = values["trainer"], values["config"], to_dict(config)
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
    keys = ("train", "batch_size"), ("data", "images_per_identity"), ("data", "sampler")
    same = all(held.get(section, {}).get(k) == asked[section][k] for section, k in keys)
    if done and config.data.sampler == "balanced" and not same:
        raise UserError(
            f"{path} is of the middle of an epoch, whose batches data.sampler=balanced makes for "
            "one train.batch_size and data.images_per_identity; leave them as they were, or resume "
            "from the end of an epoch"
        )
    return course


def check_resumable(
    values: dict[str, Any], path: Path, config: Config, loss_state: Sequence[str], *, sharded: bool
) -> None:
    """An error where a part of the state would be taken over by another kind of part.

    Args:
        loss_state: names in the state of the present losses.
        sharded: the present class loss has its classes in shards.
    """
    held, asked = values["config"], to_dict(config)
    optimizer = held.get("train", {}).get("optimizer", "sgd")
    if optimizer != config.train.optimizer:
        raise UserError(
            f"{path} holds the state of {optimizer}; leave train.optimizer as it was, or begin a "
            "run from its weights by train.finetune"
        )
    if is_sharded(path) != sharded:
        shards = "no shards of classes" if sharded else "shards of classes"
        raise UserError(f"{path} holds {shards}; leave partial_fc.enabled as it was")
    model = held.get("model", {}).get("name", config.model.name)
    if model != config.model.name:  # whose weights fit all the same
        raise UserError(f"{path} holds {model}, not {config.model.name}")
    for part in ("class", "pair"):
        before, now = held.get("loss", {}).get(part, asked["loss"][part]), asked["loss"][part]
        names = [*values["loss"], *loss_state]
        # What lies in shards is the class loss's.
        has_state = part == "class" or any(name.startswith("pair_loss.") for name in names)
        if before != now and has_state:
            raise UserError(
                f"{path} holds another loss, the state of loss.{part}={before}, not of {now}; "
                f"leave loss.{part} as it was, or begin a run from its weights by train.finetune"
            )
    if config.loss.memory and values.get("memory") is None:
        raise UserError(f"{path} was trained without loss.memory and holds none")


def report(
    values: dict[str, Any],
    path: Path,
    config: Config,
    course: Course,
    identities: Identities,
    processes: int,
) -> str:
    """The step that a run goes on from, what is the same, what differs and what that does."""
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
            where = OTHER_ORDER if course.done else "from the next step on"
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
    """The learning rate of the next step, where it differs from that of the run before."""
    counts = _counts(values)
    before = dataclasses.replace(
        course,
        train=TrainConfig(**{**asked["train"], **held.get("train", {})}),
        images=course.images if counts is None else int(counts.sum()),
    )
    if any(c.begin >= c.total_steps for c in (course, before)):  # one of them has ended
        return []
    old, new = before.lr(course.begin), course.lr(course.begin)
    what = "learning rate of the next step"
    return [] if old == new else [Difference(what, old, new, "by the keys above")]
