"""Keys with other values than those of the run that wrote a checkpoint, and what a change does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config.layers import to_dict
from train.config.sections import Config

OTHER_ORDER = "another order of images: what is left of this epoch repeats and leaves out some"
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
    (("run.seed", "data.sampler", "data.images_per_identity"), OTHER_ORDER),
    (("data.path", "data.holdout"), "the identities to train on are the same"),
    (("model.weights", "train.init", "train.finetune"), "none: the weights are the checkpoint's"),
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
    """Differences of two results of :func:`to_dict`; the first may lack newer keys."""
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
