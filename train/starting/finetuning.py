"""``train.finetune``: a run that starts from another one; identities are matched by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import unitsface_kernels as uk
from train import checkpoint
from train.data.identities import unpack_names
from train.errors import UserError
from train.evaluation.embed import embed
from train.evaluation.test_sets import open_uncached
from train.trainer import Trainer

BLOCK = 16384  # images embedded at a time
WEIGHT, PROTOTYPES = "class_loss.weight", "class_loss.prototypes"


@dataclass(frozen=True)
class _Held:
    """The losses in a checkpoint, by the names of tensors in :class:`train.losses.FaceLoss`."""

    tensors: dict[str, Tensor]
    rows: dict[str, Tensor]  # (K, ...) of the kept classes, of tensors that have one per class
    states: dict[str, dict[str, Tensor]]  # the same of the optimizer, if classes are in shards
    optimizer: dict[str, Any] | None  # its state dict, with the others


@dataclass(frozen=True)
class _Kept:
    """The classes of a tensor that are in the checkpoint, too."""

    places: Tensor  # (K,) rows of the tensor
    index: Tensor  # (K,) labels in the checkpoint
    size: int  # rows of the tensor

    @classmethod
    def of(cls, classes: NDArray[np.int64]) -> _Kept:
        before = torch.from_numpy(classes)
        places = (before >= 0).nonzero()[:, 0]
        return cls(places, before[places], len(classes))


def finetune(trainer: Trainer, run: Path) -> str:
    """Load what ``train.finetune`` has learned; every process calls. A line on what was kept.

    The optimizer's state is taken over where optimizer and losses are the run's, and classes in
    shards as they were there; that of new classes is zero. Where the run has no class weights of
    this shape, all classes are new.

    Raises:
        UserError: no checkpoint of a run, or one of another backbone.
    """
    path = checkpoint.found(run)
    values = checkpoint.read_run(path)
    config, names = trainer.config, trainer.source.images.identities
    trainer.load_backbone(values, path)
    begin = f"finetuning {path} of step {values['trainer']['step']}"
    if config.train.finetune_head == "fresh":
        return f"{begin}: its backbone"
    held_names = unpack_names(values["identities"])
    labels = {name: i for i, name in enumerate(held_names)}
    classes = np.array([labels.get(name, -1) for name in names], dtype=np.int64)
    own = loss_tensors(trainer)
    with torch.no_grad():
        taken, continues = _take(trainer, own, values, path, classes)
        has_weights, fits = WEIGHT in own, WEIGHT in taken
        if has_weights and not fits:
            classes = np.full_like(classes, -1)
        new = np.flatnonzero(classes < 0)
        if len(new) and has_weights:
            _warm_start(trainer, own, new, classes)
    for module in (trainer.loss, trainer.head):
        if module is not None:  # what a module keeps beside its tensors follows
            module.load_state_dict(module.state_dict())
    kept = len(classes) - len(new)
    said = [
        f"{begin}: {kept} identities kept"
        f"{'' if trainer.source.images.named else ' (by their numbers: they have no names)'}, "
        f"{len(held_names) - kept} dropped, {len(new)} new"
        f"{', which begin at their mean features' if len(new) and has_weights else ''}"
    ]
    said += ["it has no class weights of this shape"] if has_weights and not fits else []
    return "; ".join([*said, *([] if continues else ["the optimizer begins anew"])])


def _take(
    trainer: Trainer,
    own: dict[str, Tensor],
    values: dict[str, Any],
    path: Path,
    classes: NDArray[np.int64],
) -> tuple[set[str], bool]:
    """Names of the tensors of the losses that were taken over, and whether the state of the
    optimizer was.
    """
    loss, head = trainer.config.loss, trainer.head
    every = shard = _Kept.of(classes)
    if head is not None:
        shard = _Kept.of(classes[head.shard.start : head.shard.stop])
    kept = {name: shard if name.startswith("class_loss.") else every for name in own}
    held = _read(values, path, kept)
    before = values["config"].get("loss", {})
    same = {"class": before.get("class") == loss.class_name}
    same["pair"] = before.get("pair") == loss.pair_name
    taken = set()
    for name, tensor in own.items():
        if not same[name.split("_")[0]] and name != WEIGHT:
            continue  # of another loss it means something else
        rows, whole = held.rows.get(name), held.tensors.get(name)
        sizes = (kept[name].size, *(() if rows is None else rows.shape[1:]))
        if rows is not None and tensor.shape == sizes:
            # A margin that is no parameter follows from the images of each class.
            if isinstance(tensor, nn.Parameter) or not name.endswith(".margin"):
                tensor[kept[name].places] = rows.to(tensor)
        elif whole is not None and whole.shape == tensor.shape:
            tensor.copy_(whole)
        else:
            continue
        taken.add(name)
    optimizer = values["config"].get("train", {}).get("optimizer", "sgd")
    learned = {name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    fits = all(same.values()) and learned <= taken and optimizer == trainer.config.train.optimizer
    fits = fits and checkpoint.is_sharded(path) == (head is not None)
    return taken, fits and _take_state(trainer, held, own, kept, path)


def loss_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and buffers of the losses, by the same names with and without shards."""
    own = _named(trainer.loss.state_dict(keep_vars=True), "")
    if trainer.head is not None:
        own |= _named(trainer.head.state_dict(keep_vars=True))
    return own


def _named(state: dict[str, Any], prefix: str = "class_") -> dict[str, Tensor]:
    """Tensors by their names in a :class:`FaceLoss` whose class loss is built on no other one."""
    tensors = {f"{prefix}{name}": t for name, t in state.items() if isinstance(t, Tensor)}
    return {name.replace("class_loss.head.", "class_loss."): t for name, t in tensors.items()}


def _read(values: dict[str, Any], path: Path, kept: dict[str, _Kept]) -> _Held:
    count = len(unpack_names(values["identities"]))
    tensors = _named(values["loss"], "")
    rows = {
        name: t[kept[name].index]
        for name, t in tensors.items()
        if name in kept and t.dim() and len(t) == count
    }
    if not checkpoint.is_sharded(path):
        return _Held(tensors, rows, {}, values["optimizer"])
    index = kept[WEIGHT].index if WEIGHT in kept else torch.empty(0, dtype=torch.int64)
    try:
        found = uk.partial_fc.read_classes(path, index)
    except ValueError as error:
        raise UserError(str(error)) from error
    states: dict[str, dict[str, Tensor]] = {}
    for name, state in found.states.items():
        for key, value in state.items():
            (own,) = _named({name: value})
            states.setdefault(own, {})[key] = value
    tensors, rows = tensors | _named(found.shared), rows | _named(found.rows)
    return _Held(tensors, rows, states, found.optimizer)


def _take_state(
    trainer: Trainer, held: _Held, own: dict[str, Tensor], kept: dict[str, _Kept], path: Path
) -> bool:
    """Whether the optimizer has gone on with the state of the run: all of it, or none."""
    groups = trainer.optimizer.param_groups
    before = {} if held.optimizer is None else held.optimizer
    names = {id(tensor): name for name, tensor in own.items()}
    state: dict[int, dict[str, Any]] = {}
    try:
        counts = [len(group["params"]) for group in before.get("param_groups", [])]
        if counts != [len(group["params"]) for group in groups]:
            return False
        for i, parameter in enumerate(p for group in groups for p in group["params"]):
            name = names.get(id(parameter), "")
            state[i] = {**before["state"].get(i, {})}
            for key, value in [*state[i].items(), *held.states.get(name, {}).items()]:
                if name in held.rows and isinstance(value, Tensor) and value.dim():
                    rows = value if name in held.states else value[kept[name].index]
                    state[i][key] = torch.zeros(len(parameter), *rows.shape[1:], dtype=rows.dtype)
                    state[i][key][kept[name].places] = rows
    except Exception as error:  # a file may hold anything
        raise UserError(f"{path} holds no state of {type(trainer.optimizer).__name__}") from error
    own_groups = trainer.optimizer.state_dict()["param_groups"]
    state = {i: values for i, values in state.items() if values}
    values = {"state": state, "param_groups": own_groups}
    checkpoint.load_optimizer(trainer.optimizer, values, path)
    return True


def _warm_start(
    trainer: Trainer, own: dict[str, Tensor], new: NDArray[np.int64], classes: NDArray[np.int64]
) -> None:
    """Weights and prototypes of new classes: the direction of the mean of their unit features.

    Weights are as long as the others on average. Of several centers it is the first one.
    """
    weight, prototypes = own[WEIGHT], own.get(PROTOTYPES)
    centers = weight if weight.dim() == 2 else weight[:, 0]
    first = 0 if trainer.head is None else trainer.head.shard.start
    norms = weight.norm(dim=-1)
    norms = norms[_Kept.of(classes[first : first + len(weight)]).places.to(norms.device)]
    parts = trainer.world.gather_objects((float(norms.sum()), norms.numel()))
    total, count = (sum(part) for part in zip(*parts, strict=True))
    means = F.normalize(_mean_features(trainer, new), dim=1)
    rows = torch.from_numpy(new) - first
    # Of this process, with an image that could be read.
    chosen = (rows >= 0) & (rows < len(weight)) & means.any(1)
    rows, means = rows[chosen].to(weight.device), means[chosen].to(weight)
    centers[rows] = means * (total / count if count else centers[rows].norm(dim=1, keepdim=True))
    if prototypes is not None:
        prototypes[rows] = means


def _mean_features(trainer: Trainer, new: NDArray[np.int64]) -> Tensor:
    """(len(new), D) sums of the unit features of each, on all processes."""
    config, world, images = trainer.config, trainer.world, trainer.source.images
    sums = torch.zeros(len(new), config.model.embedding_size)
    place = np.full(len(images.identities), -1)
    place[new] = np.arange(len(new))
    chosen = np.flatnonzero(place[images.labels] >= 0)
    for start in range(0, len(chosen), BLOCK):
        block = chosen[start : start + BLOCK]
        part = replace(images, rows=images.rows[block], labels=images.labels[block])
        source = open_uncached(config, part)
        features, labels = embed(trainer.backbone, source, world.device, world=world)
        read = source.readable()
        unit = F.normalize(torch.from_numpy(features[read]), dim=1)
        sums.index_add_(0, torch.from_numpy(place[labels[read]]), unit)
    return sums
