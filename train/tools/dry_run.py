"""``--dry-run``: build what a configuration describes, take a step on synthetic images, and print
the memory, steps and time of the run. Nothing is written, and the data need not be there.

Tensors that grow with the classes are built for at most :data:`CLASSES_BUILT` of them and scaled to
the real number; what the backward pass keeps is counted in the run's precision, on any device.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from train.config import Config
from train.data.dataset import check_batch, scan
from train.data.image_list import ImageList, split_identities
from train.data.loader import ImageSource
from train.data.named import holdout_of
from train.data.records import Encoded
from train.distributed import DistributedEnv, choose_device, place
from train.errors import DivergedError, UserError
from train.losses import NO_LOSS, set_epoch, shards_classes
from train.schedule import Course
from train.starting.start import load_start
from train.train_step import AMP_DTYPES, autocast
from train.trainer import Trainer

CLASSES_BUILT = 65_536
WARM_S = 10.0  # a first step that takes longer is not repeated


@dataclass(frozen=True)
class Plan:
    """Sizes of a run on the real data."""

    course: Course
    identities: int
    source: str  # origin of these numbers
    processes: int
    sharded: bool

    @property
    def images_per_process(self) -> int:
        return math.ceil(self.course.batch / self.processes)

    @property
    def classes_per_process(self) -> int:
        return math.ceil(self.identities / self.processes) if self.sharded else self.identities


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def dry_run(config: Config, *, batch: int, processes: int) -> int:
    if place().size > 1:
        raise UserError("--dry-run is for one process; --dry-run-processes says for how many")
    if batch < 2 or processes < 1:
        raise UserError(
            f"--dry-run-batch and --dry-run-processes: expected at least 2 and 1, "
            f"got {batch} and {processes}"
        )
    plan = make_plan(config, processes)
    built = min(plan.classes_per_process, CLASSES_BUILT)
    trainer = build_trainer(config, plan, built, batch)
    load_start(trainer, backbone_only=True)
    loss, seconds, activations = synthetic_step(trainer)
    if not math.isfinite(loss):
        raise DivergedError(f"the loss of a synthetic step is {loss}")
    memory = measure(trainer, plan, built, activations // batch)
    describe(trainer, config, plan, memory)
    print(
        f"one step: {batch} images of {built} classes in {seconds:.1f} s "
        f"on {trainer.world.device.type}, loss {loss:.3f}"
    )
    print(estimate(trainer, plan, built, batch, seconds))
    return 0


def estimate(trainer: Trainer, plan: Plan, built: int, batch: int, seconds: float) -> str:
    """Time to the end of the run if its steps took what this one took, by the number of images."""
    device, amp = trainer.world.device.type, trainer.config.train.amp
    precision = amp if device == "cuda" and amp != "none" else "float32"
    hours = seconds * plan.images_per_process / batch * plan.course.total_steps / 3600
    shown = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    left_out = ["reading and augmenting images", "evaluations and checkpoints"]
    left_out += ["the exchange between processes"] if plan.processes > 1 else []
    classes = plan.classes_per_process
    if built < classes and trainer.config.loss.class_name != NO_LOSS:
        left_out.append(f"the other {classes - built} classes of a process")
    return (
        f"time to the end, estimated from this step on this machine ({device}, {precision}): "
        f"{shown}, {plan.course.total_steps} steps of {plan.images_per_process} images a process; "
        f"left out: {', '.join(left_out)}"
    )


def make_plan(config: Config, processes: int) -> Plan:
    """Sizes of the data, and what follows; the configuration's own where there is no data."""
    data = config.data
    try:
        found = scan(data.path)
        found, _ = split_identities(found, holdout_of(data.path, data.holdout))
        images, identities, source = len(found), len(found.identities), f"in {data.path}"
    except UserError as error:
        if not (data.num_images and data.num_identities):
            raise UserError(
                f"{error} (--dry-run does without the data where data.num_images and "
                "data.num_identities say how much there is)"
            ) from error
        images, identities = data.num_images, data.num_identities
        source = f"as data.num_images and data.num_identities have it ({error})"
    check_batch(config, images, processes)
    sharded = shards_classes(config.loss, config.partial_fc, processes)
    return Plan(Course(config.train, images), identities, source, processes, sharded)


def build_trainer(config: Config, plan: Plan, built: int, batch: int) -> Trainer:
    """The run's trainer, for ``built`` classes and with ``batch`` synthetic images as its data."""
    enabled = "always" if plan.sharded else "never"
    # Every identity twice, so that there are positives and negatives.
    labels = np.arange(batch, dtype=np.int64) // 2 % built
    images = ImageList(
        records=Encoded([], "synthetic images"),
        rows=np.arange(batch, dtype=np.int64),
        labels=labels,
        identities=[str(label) for label in range(built)],
    )
    size = config.model.input_size
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (batch, 3, size, size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    changed = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=batch),
        partial_fc=dataclasses.replace(config.partial_fc, enabled=enabled),
    )
    world = DistributedEnv(0, 1, choose_device(config.train.device, 0))
    return Trainer(changed, world, ImageSource(images, size, False, pixels=pixels))


def synthetic_step(trainer: Trainer) -> tuple[float, float, int]:
    """A step with all terms of the loss; the loss, the seconds of a second one, and the bytes that
    the backward pass of the backbone keeps in the run's precision, which need not be this step's.
    """
    device = trainer.world.device
    # The last epoch's losses: some have terms that start late.
    for losses in (trainer.loss, trainer.head):
        if losses is not None:
            set_epoch(losses, trainer.config.train.epochs - 1)
    pixels, labels = next(trainer.source.batches([range(len(trainer.source.images))]))
    labels = labels.to(device)
    images = pixels.to(device).float() / 127.5 - 1.0
    if trainer.config.model.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    trainer.module.train()

    def step() -> float:
        trainer.optimizer.zero_grad(set_to_none=True)
        # Reduced precision is emulated on many CPUs, which would take minutes.
        with autocast(trainer.config, device) if device.type == "cuda" else nullcontext():
            features = trainer.backbone(images)
            memory = None
            if trainer.memory is not None:
                trainer.memory.update(features.detach(), labels)
                memory = (trainer.memory.features, trainer.memory.labels)
            total = trainer.loss(features, labels, memory)[0]
            if trainer.head is not None:
                total = total + trainer.config.loss.class_weight * trainer.head(features, labels)
        total.backward()
        trainer.optimizer.step()
        return float(total.detach())

    start = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    if math.isfinite(loss) and seconds < WARM_S:  # the first one allocates and chooses algorithms
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    return loss, seconds, len(images) * kept_per_image(trainer.config)


def kept_per_image(config: Config) -> int:
    """Bytes that the backward pass of the backbone needs of an image, in the run's precision.

    Counted on tensors without memory, so that it does not depend on the device: the slope between
    batches of 2 and 4, since what does not grow with the batch drops out.
    """
    model, dtype = config.model, AMP_DTYPES.get(config.train.amp)
    kept = []
    with FakeTensorMode():
        backbone = model.build()
        for batch in (2, 4):
            counter = Kept([*backbone.parameters(), *backbone.buffers()])
            images = torch.empty(batch, 3, model.input_size, model.input_size)
            with (
                torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
                torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor),
            ):
                backbone(images)
            kept.append(counter.bytes)
    return (kept[1] - kept[0]) // 2


class Kept:
    """Adds up the storages that autograd keeps, but for those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        # By place of the object: tensors without memory have no other. Kept, or a place is reused.
        self.kept = list(known)
        self.seen = {tensor.untyped_storage()._cdata for tensor in self.kept}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def measure(trainer: Trainer, plan: Plan, built: int, bytes_per_image: int) -> Memory:
    """Memory after a step, scaled from the classes and images there are to the run's."""
    weights = gradients = optimizer = 0

    def scaled(tensor: Tensor, classes: int) -> int:
        # A drawn share of the classes has a sparse gradient, which grows with them, too.
        grows = tensor.is_sparse or (tensor.dim() > 0 and tensor.shape[0] == built)
        return size_of(tensor) * classes // built if grows else size_of(tensor)

    # A process holds its part of the sharded classes, and all of everything else.
    parts: list[tuple[nn.Module | None, int]] = [
        (trainer.backbone, built),
        (trainer.loss, plan.identities),
        (trainer.memory, plan.identities),
        (trainer.head, plan.classes_per_process),
    ]
    for module, classes in parts:
        if module is None:
            continue
        weights += sum(scaled(t, classes) for t in [*module.parameters(), *module.buffers()])
        for p in module.parameters():
            gradients += 0 if p.grad is None else scaled(p.grad, classes)
            states = trainer.optimizer.state.get(p, {}).values()
            optimizer += sum(scaled(t, classes) for t in states if isinstance(t, Tensor))
    return Memory(weights, gradients, optimizer, bytes_per_image * plan.images_per_process)


def size_of(tensor: Tensor) -> int:
    if tensor.is_sparse:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.nbytes


def describe(trainer: Trainer, config: Config, plan: Plan, memory: Memory) -> None:
    model, train = config.model, config.train
    backbone = sum(p.numel() for p in trainer.backbone.parameters())
    classes = 0 if config.loss.class_name == NO_LOSS else plan.classes_per_process
    course = plan.course
    rates = [course.lr(step) for step in range(course.total_steps)]
    precision = "" if train.amp == "none" else f", {train.amp}"
    print(
        f"model: {model.name} at {model.input_size} x {model.input_size}, "
        f"{model.embedding_size} features\n"
        f"data: {course.images} images of {plan.identities} identities, {plan.source}\n"
        f"steps: {course.steps_per_epoch} an epoch of {train.batch_size} images, "
        f"{course.total_steps} in all\n"
        f"learning rate: {rates[0]:.3g} first, {max(rates):.3g} at its peak, {rates[-1]:.3g} last\n"
        f"processes: {plan.processes}, with {plan.images_per_process} images each\n"
        f"parameters: {backbone} of the backbone, {classes * model.embedding_size} class weights "
        f"of {classes} classes in each process\n"
        f"memory of a process, predicted: {gigabytes(memory.total)}\n"
        f"  weights and buffers {gigabytes(memory.weights)}\n"
        f"  gradients {gigabytes(memory.gradients)}\n"
        f"  optimizer {gigabytes(memory.optimizer)}\n"
        f"  activations of {plan.images_per_process} images "
        f"{gigabytes(memory.activations)}{precision}"
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"
