"""Class weights in checkpoints of other programs, joined from the files of all ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import checkpoint
from train.errors import UserError

# Names of a rank's file: the checkpoint itself in arcface_torch, beside model.pt in CVLFace.
_ARCFACE = re.compile(r"(checkpoint_gpu_)\d+(\.pt)")
_CVLFACE = "classifier_rank", ".pt"
# Of an arcface_torch checkpoint, of CVLFace's PartialFC and of its FC.
_ENTRIES = ("weight", "partial_fc.weight", "classifier.weight")


def read_class_weights(values: Any, path: Path) -> Tensor | None:
    """(C, D) float32 class weights that belong to a backbone; None if there are none.

    Sources: deepinsight/insightface, recognition/arcface_torch/train_v2.py and partial_fc_v2.py
    (``state_dict_softmax_fc`` in checkpoint_gpu_RANK.pt); mk-minchul/AdaFace, head.py
    (``head.kernel``, (D, C)); mk-minchul/CVLface, classifiers/base (classifier_rankRANK.pt).

    Args:
        values: what the file at ``path`` holds.

    Raises:
        UserError: a rank's part is missing, of another step, or no part of such a matrix.
    """
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("state_dict"), dict):
        kernel = values["state_dict"].get("head.kernel")
        return _matrix(kernel, path).T.contiguous() if kernel is not None else None
    if "state_dict_softmax_fc" in values:
        match = _ARCFACE.fullmatch(path.name)
        parts = _ranks(path, *match.groups()) if match else [(path, values)]
        held = [(p, part if isinstance(part, dict) else {}) for p, part in parts]
        steps = {f"epoch {p.get('epoch')}, step {p.get('global_step')}" for _, p in held}
        if len(steps) > 1:
            shown = "; ".join(sorted(steps))
            raise UserError(f"{path} and the files beside it are of different steps: {shown}")
        return _joined([(p, part.get("state_dict_softmax_fc")) for p, part in held])
    cvlface = any(str(key).startswith("net.") for key in values)
    return _joined(_ranks(path, *_CVLFACE)) if cvlface else None


def _ranks(path: Path, begin: str, end: str) -> list[tuple[Path, Any]]:
    """Paths and contents of all ranks' files in the folder of ``path``."""
    number = re.compile(rf"{begin}(\d{{1,6}}){re.escape(end)}")
    found = {int(m[1]): p for p in path.parent.iterdir() if (m := number.fullmatch(p.name))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise UserError(f"{path.with_name(f'{begin}{missing[0]}{end}')} is missing")
    return [(found[rank], checkpoint.read(found[rank])) for rank in sorted(found)]


def _joined(parts: list[tuple[Path, Any]]) -> Tensor | None:
    """One matrix of those of all ranks: C // W rows each, one more for the first C % W."""
    weights = []
    for path, state in parts:
        state = state if isinstance(state, dict) else {}
        weight = next((state[entry] for entry in _ENTRIES if entry in state), None)
        weights.append(_matrix(weight, path))
    sizes = [len(weight) for weight in weights]
    if sizes != sorted(sizes, reverse=True) or (sizes and sizes[0] - sizes[-1] > 1):
        raise UserError(f"{parts[0][0]} and the files beside it are no shards of a head: {sizes}")
    if len({weight.shape[1] for weight in weights}) > 1:
        raise UserError(f"{parts[0][0]} and the files beside it are of different embedding sizes")
    return torch.cat(weights) if weights else None


def _matrix(weight: Any, path: Path) -> Tensor:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(f"{path}: its class weights are no matrix")
    return weight.float()
