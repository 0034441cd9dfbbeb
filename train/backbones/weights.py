"""Backbone weights in files of several origins: their tensors, and the backbone they belong to.

Origins: a bare state dict (insightface's ``backbone.pth``), a training checkpoint of arcface_torch
(``state_dict_backbone``), of UniTSFace or UniFace (``state_dict``, with the losses' tensors among
the backbone's), of AdaFace or CVLFace (:mod:`train.backbones.foreign`), or of this harness
(``backbone``, and ``ema`` for averaged weights).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from train.backbones.conv4 import CHANNELS
from train.backbones.foreign import own_names
from train.backbones.mobile import MobileFaceNet
from train.backbones.resnets import IResNet, IRNet, LResNet

# The entries under which checkpoints keep a backbone.
ENTRIES = ("backbone", "state_dict_backbone", "state_dict")
AVERAGED = "ema"
# Prefixes that DataParallel, DistributedDataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")
# Losses that UniTSFace and UniFace keep as parts of the network.
LOSSES = ("sample_to_class_loss.", "sample_to_sample_loss.", "loss.")

State = dict[str, Tensor]


def find_state(values: Any, *, averaged: bool = False) -> State | None:
    """The backbone's tensors in what a file holds, under the names of our modules.

    Args:
        averaged: take averaged weights where there are any.
    """
    if isinstance(values, dict):
        for entry in ((AVERAGED,) if averaged else ()) + ENTRIES:
            if isinstance(values.get(entry), dict):
                values = values[entry]
                break
    if not isinstance(values, dict):
        return None
    if not values or not all(isinstance(v, Tensor) for v in values.values()):
        return None
    state = own_names({_unwrapped(str(key)): value for key, value in values.items()})
    # The number of averaged steps, which AveragedModel counts beside its copy.
    state.pop("n_averaged", None)
    return {key: value for key, value in state.items() if not key.startswith(LOSSES)}


def _unwrapped(key: str) -> str:
    for prefix in WRAPPERS:
        key = key.removeprefix(prefix)
    return key


def recognize(state: State) -> str | None:
    """The backbone that a state dict belongs to, from its keys; MobileFaceNets differ in width."""
    if "blocks.0.ghost1.primary_conv.0.weight" in state and "gdc.0.weight" in state:
        return "ghostfacenet"
    if "conv_sep.layers.0.weight" in state:
        scale = state["conv_sep.layers.0.weight"].numel() // (512 * 128)
        return next((n for n, of in MobileFaceNet.STAGES.items() if of[0] == scale), None)
    if "trunk.0.0.weight" in state and "fc.weight" in state:
        return "conv4"
    blocks = tuple(
        len({k.split(".")[1] for k in state if k.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    family: type[IResNet | LResNet] = IResNet
    if "layer1.0.bn0.weight" in state:
        family = LResNet
    elif "layer1.0.downsample.0.weight" not in state:
        family = IRNet
    return next((name for name, stages in family.STAGES.items() if stages == blocks), None)


def sizes(state: State) -> tuple[int, int] | None:
    """Input size and embedding size of the backbone of a recognized state dict.

    16 input sizes give the same tensors, 112 to 127 those of an LResNet or a Conv-4 for 112 and 97
    to 112 those of the others; the multiple of 16 stands for them.
    """
    last = _first(state, "fc5.weight", "features.layers.2.weight", "fc.weight")
    if last is None or last.dim() not in (2, 4) or not last.numel():
        return None
    # The layer over all places, if that is not the last one.
    over = _first(state, "features.layers.0.layers.0.weight", "gdc.0.weight")
    over = last if over is None else over
    if over.dim() not in (2, 4):
        return None
    channels = CHANNELS if "trunk.0.0.weight" in state else 512
    side = over.shape[-1] if over.dim() == 4 else math.isqrt(over.shape[1] // channels)
    return 16 * side, last.shape[0]


def _first(state: State, *names: str) -> Tensor | None:
    return next((state[name] for name in names if name in state), None)


def differences(state: State, expected: State) -> list[str]:
    """Differences of a state dict from another's names and shapes, as text."""
    found = []
    for what, names in (
        ("missing", [k for k in expected if k not in state]),
        ("unexpected", [k for k in state if k not in expected]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{what}: {', '.join(names[:3])}{more}")
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    for key in wrong[:3]:
        given, wanted = tuple(state[key].shape), tuple(expected[key].shape)
        found.append(f"{key} is {given}, expected {wanted}")
    if len(wrong) > 3:
        found.append(f"{len(wrong) - 3} more of another shape")
    return found
