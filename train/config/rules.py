"""Checks of a configuration: bounds of single keys, and rules between keys."""

from __future__ import annotations

import math

from train.backbones import check_backbone
from train.config.keys import choices_of, names_class
from train.config.sections import NO_LOSS, Config, iter_keys, momentum_names, shardable_names
from train.errors import UserError


def check(config: Config) -> None:
    """Choices and bounds of single keys, then the rules between keys."""
    for key, f in iter_keys():
        value = getattr(getattr(config, key.split(".")[0]), f.name)
        choices, low, high = choices_of(f), f.metadata["low"], f.metadata["high"]
        own = f.metadata["own"]
        if choices and value not in choices and not (own and names_class(value)):
            or_own = ", or package.module:Class" if own else ""
            raise UserError(f"{key}: expected one of {', '.join(choices)}{or_own}; got '{value}'")
        if key in ("run.dir", "data.path") and not value:
            raise UserError(f"{key}: expected a path, got nothing")
        if isinstance(value, list) and not all(isinstance(v, str) or _usual(v) for v in value):
            raise UserError(f"{key}: expected finite numbers, got {value}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not _usual(value):
            raise UserError(f"{key}: expected a number that is finite and below 2^63")
        if not (low is None or value >= low) or not (high is None or value <= high):  # also NaN
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{key}: expected a number {bounds}, got {value}")
    check_backbone(config.model.name, config.model.options)
    if NO_LOSS == config.loss.class_name == config.loss.pair_name:
        raise UserError("loss.class and loss.pair are both 'none': nothing to train")
    if config.loss.memory and NO_LOSS in (config.loss.class_name, config.loss.pair_name):
        raise UserError(
            "loss.memory=true needs loss.pair, and loss.class to train while the memory fills"
        )
    if config.loss.class_until_filled and not config.loss.memory:
        raise UserError("loss.class_until_filled=true needs loss.memory=true")
    if config.loss.class_momentum:
        _check_momentum(config)
    _check_partial_fc(config)
    if config.train.schedule == "step" and not config.train.milestones:
        raise UserError("train.schedule=step needs train.milestones, e.g. [10,20]")
    starts = {
        "model.weights": config.model.weights,
        "train.init": config.train.init,
        "train.finetune": config.train.finetune,
    }
    given = [name for name, value in starts.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: the backbone can start from one only")
    if config.train.finetune_head != "match" and not config.train.finetune:
        raise UserError("train.finetune_head: expected train.finetune with it, a run to start from")
    if config.data.holdout == 1:
        raise UserError("data.holdout: expected 0 or at least 2 identities, got 1")
    if config.data.sampler == "balanced" and config.data.images_per_identity < 2:
        raise UserError("data.sampler=balanced needs data.images_per_identity of at least 2")


def _usual(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _check_momentum(config: Config) -> None:
    names = momentum_names()
    if config.loss.class_name not in names:
        raise UserError(
            f"loss.class_momentum=true needs a loss.class that stores features: {', '.join(names)}"
        )
    if config.train.ema == 0.0:
        raise UserError("loss.class_momentum=true needs train.ema, e.g. train.ema=0.999")


def _check_partial_fc(config: Config) -> None:
    partial, train, name = config.partial_fc, config.train, config.loss.class_name
    fused = partial.fused_optimizer
    if partial.sample_rate == 0.0:
        raise UserError("partial_fc.sample_rate: expected a number above 0 and at most 1, got 0")
    asked = [
        f"partial_fc.{key}={value}"
        for key, value, default in (
            ("enabled", partial.enabled, "always"),
            ("sample_rate", partial.sample_rate, 1.0),
            ("fused_optimizer", fused, "none"),
        )
        if (value == default) == (key == "enabled")
    ]
    if asked and name not in shardable_names() and not names_class(name):
        raise UserError(
            f"{asked[0]}: loss.class={name} is not among {', '.join(shardable_names())}"
        )
    if asked and config.loss.class_until_filled:
        raise UserError(f"{asked[0]}: loss.class_until_filled=true needs whole class weights")
    if asked and partial.enabled == "never":
        raise UserError(f"{asked[0]} needs shards of classes, not partial_fc.enabled=never")
    clips = train.clip_classes and train.clip_norm > 0
    if fused == "backward" and (train.amp == "fp16" or clips):
        reason = "train.clip_classes=true" if clips else "train.amp=fp16"
        raise UserError(
            f"partial_fc.fused_optimizer=backward moves the class weights before {reason} can "
            "scale their gradient; use partial_fc.fused_optimizer=step"
        )
    if fused != "none" and train.accumulate > 1:
        raise UserError(
            f"train.accumulate={train.accumulate}: partial_fc.fused_optimizer={fused} steps once "
            "per backward pass and keeps no gradient; use partial_fc.fused_optimizer=none"
        )
