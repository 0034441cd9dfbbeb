"""The sections of a configuration: one dataclass each, one field per key."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import unitsface_kernels as uk
from train.backbones import backbone_names, build_backbone
from train.config.keys import key, key_name, share

NO_LOSS = "none"
SCHEDULES = ("constant", "polynomial", "cosine", "step")


def shardable_names() -> list[str]:
    """Class losses whose classes can be spread over processes."""
    return sorted(uk.partial_fc.SHARDABLE)


def momentum_names() -> list[str]:
    """Class losses that store features, which may be those of another backbone."""
    taken = {n: inspect.signature(cls.forward).parameters for n, cls in uk.CLASS_LOSSES.items()}
    return sorted(name for name, parameters in taken.items() if "momentum_feats" in parameters)


@dataclass
class ModelConfig:
    name: str = key(
        "iresnet18", f"backbone ({', '.join(backbone_names())}, or timm:MODEL with any of timm's)"
    )
    input_size: int = key(112, "side of the square input image in pixels", low=16)
    dropout: float = key(0.0, "dropout before the last linear layer", low=0.0, high=0.99)
    freeze_bn: bool = key(
        False,
        "batch normalization by the stored statistics, which stay as they are: to go on from"
        " trained weights, and for runs that must not depend on the number of processes",
    )
    channels_last: bool = key(True, "channels-last memory format (faster convolutions)")
    weights: str = key(
        "", "file, such as a published .pth, or run whose backbone alone the run starts from"
    )
    embedding_size: int = key(512, "numbers in a feature", low=1)
    options: dict[str, Any] = key(
        dict,
        "keywords of timm.create_model for timm:MODEL, e.g."
        " model.options={img_size: 112, patch_size: 8, global_pool: ''}",
    )

    def build(self) -> nn.Module:
        sizes = self.input_size, self.dropout, self.embedding_size
        return build_backbone(self.name, *sizes, self.options)


@dataclass
class LossConfig:
    class_name: str = key(
        "cosface",
        "sample-to-class loss; package.module:Class is a policy of your own",
        name="class",
        own=True,
        choices=lambda: [NO_LOSS, *sorted(uk.CLASS_LOSSES)],
    )
    pair_name: str = key(
        "uss",
        "sample-to-sample loss; package.module:Class is a policy of your own",
        name="pair",
        own=True,
        choices=lambda: [NO_LOSS, *sorted(uk.PAIR_LOSSES)],
    )
    class_weight: float = key(1.0, "factor of the class loss in the sum", low=0.0)
    pair_weight: float = key(1.0, "factor of the pair loss in the sum", low=0.0)
    class_options: dict[str, Any] = key(
        dict, "constructor arguments of the class loss, e.g. loss.class_options.margin=0.4"
    )
    pair_options: dict[str, Any] = key(
        dict, "constructor arguments of the pair loss, e.g. loss.pair_options.margin=0.1"
    )
    class_learned: list[str] = key(
        list, "numbers of the class loss that are learned from their value on, e.g. [scale]"
    )
    pair_learned: list[str] = key(
        list, "numbers of the pair loss that are learned from their value on, e.g. [scale]"
    )
    class_momentum: bool = key(
        False,
        "the class loss stores the features of the averaged weights, which needs train.ema, as"
        " VPL's published option momentum does with 0.999",
    )
    pair_across_ranks: bool = key(
        True, "pairs of the pair loss are those of all processes' batches; false: of one process's"
    )
    backend: str = key("auto", "kernel backend of both losses")
    memory: bool = key(
        False,
        "compare the batch with the newest feature of every identity instead of with itself in the"
        " pair loss, as published; the first epoch fills the memory and leaves the pair loss out",
    )
    class_until_filled: bool = key(
        False, "the class loss only trains while the memory fills; then the pair loss goes on alone"
    )


@dataclass
class PartialFCConfig:
    enabled: str = key(
        "auto",
        "class weights in shards, one per process; auto: with more than one process, sample_rate"
        " below 1 or a fused optimizer; never: every process holds all of them",
        choices=("auto", "always", "never"),
    )
    sample_rate: float = share(1.0, "fraction of the classes that a step compares with")
    fused_optimizer: str = key(
        "none",
        "steps of the class weights without memory for their gradient: within the backward pass,"
        " or in the optimizer's step, at the cost of one more matmul, as train.amp=fp16 and"
        " train.clip_classes need",
        choices=("none", "backward", "step"),
    )


@dataclass
class DataConfig:
    path: str = key(
        "orl",
        "folder with one sub-folder of images per identity, with train.rec or with *.tar shards; a"
        " .rec file; a .tar file or a pattern of them such as faces-{000..099}.tar; or 'orl' or"
        " 'fashion_mnist', which come with packages",
    )
    holdout: int | None = key(
        None,
        "identities kept out of training for the final test, the last in natural order of names"
        " or numbers;"
        " null: 10 for orl, 4 for fashion_mnist, else 0",
        low=0,
    )
    on_error: str = key(
        "fail", "unreadable image: stop, or skip and count it", choices=("fail", "skip")
    )
    cache: str = key(
        "auto",
        "keep decoded images in memory; auto: when they fit in 512 MB",
        choices=("auto", "always", "never"),
    )
    workers: int = key(2, "decoding processes per training process when not cached", low=0)
    images_per_identity: int = key(
        0, "group this many images of an identity in a batch; 0: plain shuffle", low=0
    )
    flip: float = share(0.5, "probability of a horizontal flip")
    shift: float = key(0.0, "largest shift, as a fraction of the side", low=0.0, high=0.5)
    zoom: float = key(0.0, "largest relative change of size", low=0.0, high=0.5)
    rotation: float = key(0.0, "largest rotation in degrees", low=0.0, high=180.0)
    brightness: float = share(0.0, "largest relative brightness change")
    contrast: float = share(0.0, "largest relative contrast change")
    crop: float = share(
        0.0,
        "probability that all but a random rectangle, of 20 % of the image or more, turns black, as"
        " in AdaFace, whose recipes have 0.2 here and for the next two",
    )
    low_res: float = share(0.0, "probability of a resolution lowered by up to a factor of 5")
    photometric: float = share(
        0.0, "probability that brightness, contrast and saturation change by up to half"
    )
    sampler: str = key(
        "shuffle",
        "shuffle: every image once an epoch; balanced: batches of batch_size / images_per_identity"
        " identities with images_per_identity images of each, as many steps an epoch",
        choices=("shuffle", "balanced"),
    )
    max_pixels: int = key(
        16_000_000, "largest image that is decoded, its width times its height", low=1
    )
    duplicates: str = key(
        "report",
        "people and images both in training and in a test set; report: of images only where at most"
        " 50000 are trained on; fail: of all, as an error",
        choices=("report", "fail", "ignore"),
    )
    num_identities: int = key(
        0, "identities that the published set has, for --dry-run without the data", low=0
    )
    num_images: int = key(
        0, "images that the published set has, for --dry-run without the data", low=0
    )


@dataclass
class TrainConfig:
    epochs: int = key(20, "passes over the data", low=1)
    max_steps: int = key(0, "stop (and end the schedule) after this many steps; 0: no limit", low=0)
    batch_size: int = key(64, "images per step, summed over all processes", low=2)
    lr: float = key(0.1, "peak learning rate", low=0.0)
    momentum: float = share(0.9, "momentum of SGD, first beta of AdamW")
    weight_decay: float = key(
        5e-4, "weight decay (none on thresholds and learned numbers)", low=0.0
    )
    threshold_lr: float = key(
        1.0, "learning rate of thresholds and learned numbers, as a multiple of lr", low=0.0
    )
    clip_norm: float = key(5.0, "largest gradient norm of the backbone; 0: no limit", low=0.0)
    clip_classes: bool = key(False, "clip_norm is of the backbone and the losses together")
    schedule: str = key("polynomial", "learning-rate schedule", choices=SCHEDULES)
    warmup_epochs: float = key(0.0, "linear warm-up", low=0.0)
    power: float = key(2.0, "exponent of the polynomial schedule", low=0.0)
    milestones: list[float] = key(list, "epochs at which the step schedule multiplies lr by gamma")
    gamma: float = key(0.1, "factor of the step schedule", low=0.0)
    amp: str = key("none", "autocast dtype", choices=("none", "bf16", "fp16"))
    timeout_s: float = key(
        1800.0, "seconds a process waits for the others before it gives up", low=1.0, high=1e9
    )
    device: str = key("auto", "auto: CUDA when there is one", choices=("auto", "cpu", "cuda"))
    optimizer: str = key(
        "sgd",
        "optimizer; adamw's weight decay, of which 0.1 is usual, is not scaled with the gradient",
        choices=("sgd", "adamw"),
    )
    accumulate: int = key(
        1,
        "parts of a batch that go through the network one after another, for less memory; batch"
        " normalization and pairs are those of a part",
        low=1,
    )
    ema: float = key(
        0.0,
        "decay per step of a running average of the backbone's weights, which is then what is"
        " evaluated and exported; 0: none",
        low=0.0,
        high=0.999999,
    )
    compile: bool = key(False, "torch.compile the backbone")
    finetune: str = key(
        "",
        "run, or checkpoint of one, from whose backbone, losses and optimizer this one starts;"
        " identities may be others and are compared by name",
    )
    finetune_head: str = key(
        "match",
        "match: classes of train.finetune with the same names are kept, others begin at the mean of"
        " their features; fresh: all classes, losses and the optimizer begin anew",
        choices=("match", "fresh"),
    )
    init: str = key(
        "",
        "checkpoint of arcface_torch, AdaFace or CVLFace from whose backbone and class weights the"
        " run starts; its classes must be the identities of data.path, in the same order",
    )


@dataclass
class EvalConfig:
    every: int = key(0, "steps between evaluations; 0: after the last step only", low=0)
    sets: list[str] = key(list, "verification sets (.bin files) besides the identities held out")
    best: str = key(
        "accuracy", "metric, averaged over the sets that have it, by which the best is kept"
    )


@dataclass
class RunConfig:
    dir: str = key("runs/train", "run folder: config, metrics, TensorBoard events, checkpoints")
    seed: int = key(0, "seed of initialization, order and augmentation", low=0, high=2**63 - 1)
    log_every: int = key(10, "steps between lines of metrics.jsonl", low=1)
    save_every: int = key(1, "epochs between checkpoints", low=1)
    overwrite: bool = key(
        False,
        "begin a run where there is one already, which is moved aside; only on the command line",
        once=True,
    )
    deterministic: bool = key(True, "deterministic convolutions on CUDA (slower)")
    tensorboard: bool = key(True, "write TensorBoard events")
    wandb: str = key(
        "",
        "project of Weights & Biases that gets the metrics, too; WANDB_MODE=offline keeps them in"
        " the run folder; empty: none",
    )
    progress: bool = key(True, "progress: a line on a terminal, one now and then in a log")
    report: bool = key(True, "write report.html at the end")
    save_steps: int = key(0, "steps between checkpoints, besides save_every; 0: none", low=0)
    keep: int = key(
        1, "how many of the last checkpoints are kept; from 2 on, each by its step's name", low=1
    )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    partial_fc: PartialFCConfig = field(default_factory=PartialFCConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


def section_types() -> dict[str, Any]:
    return {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def iter_keys() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every ``section.key`` with its field."""
    for section, cls in section_types().items():
        for f in dataclasses.fields(cls):
            yield f"{section}.{key_name(f)}", f


def kind_of(key: str) -> str:
    """The type of a ``section.key`` as it is declared; empty for an unknown one."""
    return next((str(f.type) for known, f in iter_keys() if known == key), "")
