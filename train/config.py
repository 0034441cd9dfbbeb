"""The configuration: one dataclass per section, one field per key, help and bounds with the field.

Layers, later ones win: defaults, the checkpoint's own configuration when resuming, ``--config``
YAML, ``key=value`` arguments. Keys and value types are checked against the dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.backbones import STAGES
from train.errors import UserError
from train.losses import NO_LOSS, class_loss_names, pair_loss_names, shardable_names
from train.schedule import SCHEDULES


def _about(
    help: str,
    *,
    name: str | None = None,
    choices: Any = None,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    """What a field says of itself. ``choices`` is a sequence, or a function giving one."""
    return {"help": help, "name": name, "choices": choices, "low": low, "high": high}


def _key(default: Any, help: str, **about: Any) -> Any:
    return field(default=default, metadata=_about(help, **about))


def _loss_choices(names: list[str]) -> list[str]:
    return [NO_LOSS, *names]


@dataclass
class ModelConfig:
    name: str = _key("iresnet18", "backbone", choices=tuple(STAGES))
    input_size: int = _key(112, "side of the square input image in pixels", low=16)
    dropout: float = _key(0.0, "dropout before the last linear layer", low=0.0, high=0.99)
    freeze_bn: bool = _key(
        False,
        "batch normalisation by the stored statistics, which stay as they are: to go on from"
        " trained weights, and for runs that must not depend on the number of processes",
    )
    channels_last: bool = _key(True, "channels-last memory format (faster convolutions)")
    weights: str = _key("", "backbone state dict to start from, e.g. a published .pth file")


@dataclass
class LossConfig:
    class_name: str = _key(
        "cosface",
        "sample-to-class loss",
        name="class",
        choices=lambda: _loss_choices(class_loss_names()),
    )
    pair_name: str = _key(
        "uss",
        "sample-to-sample loss",
        name="pair",
        choices=lambda: _loss_choices(pair_loss_names()),
    )
    class_weight: float = _key(1.0, "factor of the class loss in the sum", low=0.0)
    pair_weight: float = _key(1.0, "factor of the pair loss in the sum", low=0.0)
    class_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            "constructor arguments of the class loss, e.g. loss.class_options.margin=0.4"
        ),
    )
    pair_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            "constructor arguments of the pair loss, e.g. loss.pair_options.margin=0.1"
        ),
    )
    pair_across_ranks: bool = _key(
        True,
        "pairs of the pair loss are those of all processes' batches; false: of one process's",
    )
    backend: str = _key("auto", "kernel backend of both losses")
    memory: bool = _key(
        False,
        "compare the batch with the newest feature of every identity instead of with itself in the"
        " pair loss, as published; the first epoch fills the memory and leaves the pair loss out",
    )


@dataclass
class PartialFCConfig:
    enabled: str = _key(
        "auto",
        "class weights in shards, one per process; auto: with more than one process, sample_rate"
        " below 1 or a fused optimizer; never: every process holds all of them",
        choices=("auto", "always", "never"),
    )
    sample_rate: float = _key(
        1.0, "share of the classes that a step compares with", low=0.0, high=1.0
    )
    fused_optimizer: str = _key(
        "none",
        "steps of the class weights without memory for their gradient: within the backward pass,"
        " or in the optimizer's step, at the cost of one more product, as train.amp=fp16 and"
        " train.clip_classes need",
        choices=("none", "backward", "step"),
    )


@dataclass
class DataConfig:
    path: str = _key("orl", "folder with one sub-folder of images per identity, or 'orl'")
    holdout: int | None = _key(
        None,
        "identities kept out of training for the final test, the last in natural order of names;"
        " null: 10 for orl, else 0",
        low=0,
    )
    on_error: str = _key(
        "fail", "unreadable image: stop, or skip and count it", choices=("fail", "skip")
    )
    cache: str = _key(
        "auto",
        "keep decoded images in memory; auto: when they fit in 512 MB",
        choices=("auto", "always", "never"),
    )
    workers: int = _key(2, "decoding processes per training process when not cached", low=0)
    images_per_identity: int = _key(
        0, "group this many images of an identity in a batch; 0: plain shuffle", low=0
    )
    flip: float = _key(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    shift: float = _key(0.0, "largest shift, as a fraction of the side", low=0.0, high=0.5)
    zoom: float = _key(0.0, "largest relative change of size", low=0.0, high=0.5)
    rotation: float = _key(0.0, "largest rotation in degrees", low=0.0, high=180.0)
    brightness: float = _key(0.0, "largest relative brightness change", low=0.0, high=1.0)
    contrast: float = _key(0.0, "largest relative contrast change", low=0.0, high=1.0)


@dataclass
class TrainConfig:
    epochs: int = _key(20, "passes over the data", low=1)
    max_steps: int = _key(
        0, "stop (and end the schedule) after this many steps; 0: no limit", low=0
    )
    batch_size: int = _key(64, "images per step, summed over all processes", low=2)
    lr: float = _key(0.1, "peak learning rate", low=0.0)
    momentum: float = _key(0.9, "SGD momentum", low=0.0, high=1.0)
    weight_decay: float = _key(5e-4, "SGD weight decay (none on thresholds)", low=0.0)
    threshold_lr: float = _key(1.0, "learning rate of thresholds, as a multiple of lr", low=0.0)
    clip_norm: float = _key(5.0, "largest gradient norm of the backbone; 0: no limit", low=0.0)
    clip_classes: bool = _key(False, "clip_norm is of the backbone and the losses together")
    schedule: str = _key("polynomial", "learning-rate schedule", choices=SCHEDULES)
    warmup_epochs: float = _key(0.0, "linear warm-up", low=0.0)
    power: float = _key(2.0, "exponent of the polynomial schedule", low=0.0)
    milestones: list[float] = field(
        default_factory=list,
        metadata=_about("epochs at which the step schedule multiplies lr by gamma"),
    )
    gamma: float = _key(0.1, "factor of the step schedule", low=0.0)
    amp: str = _key("none", "autocast dtype", choices=("none", "bf16", "fp16"))
    timeout_s: float = _key(
        1800.0, "seconds a process waits for the others before it gives up", low=1.0
    )
    device: str = _key("auto", "auto: CUDA when there is one", choices=("auto", "cpu", "cuda"))


@dataclass
class RunConfig:
    dir: str = _key("runs/train", "run folder: config, metrics, TensorBoard events, checkpoints")
    seed: int = _key(0, "seed of initialisation, order and augmentation", low=0)
    log_every: int = _key(10, "steps between lines of metrics.jsonl", low=1)
    save_every: int = _key(1, "epochs between checkpoints", low=1)
    overwrite: bool = _key(False, "allow a run folder that already holds a run; it is replaced")
    deterministic: bool = _key(True, "deterministic convolutions on CUDA (slower)")
    tensorboard: bool = _key(True, "write TensorBoard events")
    progress: bool = _key(True, "progress bar")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    partial_fc: PartialFCConfig = field(default_factory=PartialFCConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


def _key_name(f: dataclasses.Field[Any]) -> str:
    """The user's name of a field: ``loss.class`` cannot be an attribute in Python."""
    return str(f.metadata.get("name") or f.name)


def _sections() -> dict[str, Any]:
    return {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def iter_keys() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every ``section.key`` with its field."""
    for section, cls in _sections().items():
        for f in dataclasses.fields(cls):
            yield f"{section}.{_key_name(f)}", f


def choices_of(f: dataclasses.Field[Any]) -> tuple[str, ...]:
    choices = f.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())


def _rename(values: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """User keys to attribute names; any unknown key is an error that suggests a near one."""
    known = dict(iter_keys())
    renamed: dict[str, dict[str, Any]] = {}
    for section, entries in values.items():
        if not isinstance(entries, dict):
            raise UserError(f"{source}: unknown key '{section}'{_suggest(str(section), known)}")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in known:
                raise UserError(f"{source}: unknown key '{key}'{_suggest(key, known)}")
            renamed.setdefault(str(section), {})[known[key].name] = value
    return renamed


def _suggest(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else " (--help lists all keys)"


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not valid YAML: {error}") from error
    if values is None or values == {}:
        return {}
    return _string_keys(values, str(path))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """``["train.lr=0.1", ...]`` to nested values; right-hand sides are YAML."""
    for item in overrides:
        key, separator, _ = item.partition("=")
        if not separator or not key:
            raise UserError(f"argument '{item}': expected key=value")
        if "." not in key:
            known = dict(iter_keys())
            raise UserError(f"command line: unknown key '{key}'{_suggest(key, known)}")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot parse arguments {' '.join(overrides)}: {error}") from error
    return _string_keys(values, "command line")


def _string_keys(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections of keys, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def make_config(*layers: tuple[str, dict[str, Any]]) -> Config:
    """Merge ``(where it came from, nested values)`` layers over the defaults, and check."""
    merged = OmegaConf.structured(Config)
    for source, values in layers:
        try:
            merged = OmegaConf.merge(merged, _rename(values, source))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", "") or ""
            user_key = next(
                (k for k, f in iter_keys() if key == f"{k.split('.')[0]}.{f.name}"), key
            )
            raise UserError(f"{source}: {user_key}: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


def check(config: Config) -> None:
    """Choices and bounds of single keys, then the rules between keys."""
    for key, f in iter_keys():
        value = getattr(getattr(config, key.split(".")[0]), f.name)
        choices, low, high = choices_of(f), f.metadata["low"], f.metadata["high"]
        if choices and value not in choices:
            raise UserError(f"{key}: expected one of {', '.join(choices)}; got '{value}'")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not (low is None or value >= low) or not (high is None or value <= high):  # also NaN
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{key}: expected a number {bounds}, got {value}")
    if NO_LOSS == config.loss.class_name == config.loss.pair_name:
        raise UserError("loss.class and loss.pair are both 'none': nothing to train")
    if config.loss.memory and NO_LOSS in (config.loss.class_name, config.loss.pair_name):
        raise UserError(
            "loss.memory=true needs loss.pair, and loss.class to train while the memory fills"
        )
    _check_partial_fc(config)
    if config.train.schedule == "step" and not config.train.milestones:
        raise UserError("train.schedule=step needs train.milestones, e.g. [10,20]")
    if config.data.holdout == 1:
        raise UserError("data.holdout: expected 0 or at least 2 identities, got 1")


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
    if asked and name not in shardable_names():
        raise UserError(
            f"{asked[0]}: loss.class={name} is not among {', '.join(shardable_names())}"
        )
    if asked and partial.enabled == "never":
        raise UserError(f"{asked[0]} needs shards of classes, not partial_fc.enabled=never")
    clips = train.clip_classes and train.clip_norm > 0
    if fused == "backward" and (train.amp == "fp16" or clips):
        reason = "train.clip_classes=true" if clips else "train.amp=fp16"
        raise UserError(
            f"partial_fc.fused_optimizer=backward moves the class weights before {reason} can "
            "scale their gradient; use partial_fc.fused_optimizer=step"
        )


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values under the user's key names; the inverse of :func:`make_config`."""
    values: dict[str, dict[str, Any]] = {}
    for key, f in iter_keys():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = getattr(getattr(config, section), f.name)
    return values


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe_keys() -> str:
    """One paragraph per key for ``--help``."""
    defaults = to_dict(Config())
    lines = []
    for key, f in iter_keys():
        section, name = key.split(".")
        default = yaml.safe_dump(defaults[section][name], default_flow_style=True).split("\n")[0]
        lines.append(f"  {key}={default}")
        choices = choices_of(f)
        lines.append(
            f"      {f.metadata['help']}" + (f" ({', '.join(choices)})" if choices else "")
        )
    return "\n".join(lines)
