"""A run that starts from another one, with other identities: by name, classes are kept or new."""

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
    """What a checkpoint has of the losses, by the names of :class:`train.losses.FaceLoss`."""

    tensors: dict[str, Tensor]
    rows: dict[str, Tensor]  # (K, ...) of the kept classes, of tensors that have one per class
    states: dict[str, dict[str, Tensor]]  # the same of the optimizer, if classes are in shards
    optimizer: dict[str, Any] | None  # its state dict, with the others


@dataclass(frozen=True)
class _Kept:
    """Classes of a tensor that were there before."""

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
    shards as they were there; that of new classes is zero.

    Raises:
        UserError: no checkpoint of a run, or one of another backbone.
    """
    path = checkpoint.found(run)
    values = checkpoint.read_run(path)
    config, names = trainer.config, trainer.source.images.identities
    checkpoint.load_backbone(trainer.backbone, values, path=path, config=config, averaged=True)
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(trainer.backbone.state_dict())
    begin = f"finetuning {path} of step {values['trainer']['step']}"
    if config.train.finetune_head == "fresh":
        return f"{begin}: its backbone"
    held_names = unpack_names(values["identities"])
    labels = {name: i for i, name in enumerate(held_names)}
    classes = np.array([labels.get(name, -1) for name in names], dtype=np.int64)
    new = np.flatnonzero(classes < 0)
    own = _tensors(trainer.loss, "")
    if trainer.head is not None:
        own |= _tensors(trainer.head, "class_")
    with torch.no_grad():
        continues = _take(trainer, own, values, path, classes)
        if len(new) and WEIGHT in own:
            _warm_start(trainer, own, new, classes)
    for module in (trainer.loss, trainer.head):
        if module is not None:  # what a module keeps beside its tensors follows
            module.load_state_dict(module.state_dict())
    kept = len(classes) - len(new)
    warm = ", which begin at their mean features" if len(new) and WEIGHT in own else ""
    return (
        f"{begin}: {kept} identities kept"
        f"{'' if trainer.source.images.named else ' (by their numbers: they have no names)'}, "
        f"{len(held_names) - kept} dropped, {len(new)} new{warm}"
        f"{'' if continues else '; the optimizer begins anew'}"
    )


def _take(
    trainer: Trainer,
    own: dict[str, Tensor],
    values: dict[str, Any],
    path: Path,
    classes: NDArray[np.int64],
) -> bool:
    """Losses, and the optimizer's state, if it fits: returned."""
    loss, head = trainer.config.loss, trainer.head
    every = shard = _Kept.of(classes)
    if head is not None:
        shard = _Kept.of(classes[head.shard.start : head.shard.stop])
    kept = {name: shard if name.startswith("class_loss.") else every for name in own}
    held = _read(values, path, kept)
    before = values["config"].get("loss", {})
    same = {"class": before.get("class") == loss.class_name}
    same["pair"] = before.get("pair") == loss.pair_name
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
    optimizer = values["config"].get("train", {}).get("optimizer", "sgd")
    fits = all(same.values()) and optimizer == trainer.config.train.optimizer
    fits = fits and checkpoint.is_sharded(path) == (head is not None)
    return fits and _take_state(trainer, held, own, kept, path)


def _tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return _named(module.state_dict(keep_vars=True), prefix)


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
    for name, values in found.states.items():
        for key, value in values.items():
            (own,) = _named({name: value})
            states.setdefault(own, {})[key] = value
    tensors, rows = tensors | _named(found.shared), rows | _named(found.rows)
    return _Held(tensors, rows, states, found.optimizer)


def _take_state(
    trainer: Trainer, held: _Held, own: dict[str, Tensor], kept: dict[str, _Kept], path: Path
) -> bool:
    groups = trainer.optimizer.param_groups
    before = {} if held.optimizer is None else held.optimizer
    if [len(g["params"]) for g in before.get("param_groups", [])] != [
        len(g["params"]) for g in groups
    ]:
        return False
    names = {id(tensor): name for name, tensor in own.items()}
    state: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(p for group in groups for p in group["params"]):
        name = names.get(id(parameter), "")
        state[i] = {**before["state"].get(i, {})}
        for key, value in [*state[i].items(), *held.states.get(name, {}).items()]:
            if name in held.rows and isinstance(value, Tensor) and value.dim():
                rows = value if name in held.states else value[kept[name].index]
                state[i][key] = torch.zeros(len(parameter), *rows.shape[1:], dtype=rows.dtype)
                state[i][key][kept[name].places] = rows
    groups = trainer.optimizer.state_dict()["param_groups"]
    state = {i: values for i, values in state.items() if values}
    checkpoint.load_optimizer(trainer.optimizer, {"state": state, "param_groups": groups}, path)
    return True


def _warm_start(
    trainer: Trainer, own: dict[str, Tensor], new: NDArray[np.int64], classes: NDArray[np.int64]
) -> None:
    """Weights and prototypes of new classes: the direction of the mean of their unit features.

    Weights are as long as the others on average. Of several centers it is the first one.
    """
    weight, prototypes = own[WEIGHT], own.get(PROTOTYPES)
    first = 0 if trainer.head is None else trainer.head.shard.start
    norms = weight.norm(dim=-1)
    norms = norms[_Kept.of(classes[first : first + len(weight)]).places.to(norms.device)]
    parts = trainer.world.gather_objects((float(norms.sum()), norms.numel()))
    total, count = (sum(part) for part in zip(*parts, strict=True))
    means = F.normalize(_mean_features(trainer, new), dim=1).to(weight)
    for label, mean in zip(new.tolist(), means, strict=True):
        row = label - first
        if 0 <= row < len(weight) and mean.any():  # an image of it could be read
            place = weight[row] if weight.dim() == 2 else weight[row, 0]
            place.copy_(mean * (total / count if count else place.norm()))
            if prototypes is not None:
                prototypes[row] = mean


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
