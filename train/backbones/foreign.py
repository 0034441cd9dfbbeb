"""Names of the networks of AdaFace and CVLFace as those of the modules here, for images in RGB.

Sources: mk-minchul/AdaFace, net.py and inference.py: Lightning's checkpoints hold the network as
``model.`` and take images in BGR. mk-minchul/CVLface, models/iresnet, models/iresnet_insightface:
``net.`` before every name, and the order of the colors in a YAML file beside the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

_ENDS = {
    "input_layer.0": "conv1",
    "input_layer.1": "bn1",
    "input_layer.2": "prelu",
    "output_layer.0": "bn2",
    "output_layer.3": "fc",
    "output_layer.4": "features",
}
_BLOCK = {
    "res_layer.0": "bn1",
    "res_layer.1": "conv1",
    "res_layer.2": "bn2",
    "res_layer.3": "prelu",
    "res_layer.4": "conv2",
    "res_layer.5": "bn3",
    "shortcut_layer": "downsample",
}
_FIRST = "input_layer.0.weight"
_CVLFACE = (f"net.{_FIRST}", "net.conv1.weight")
_BGR = re.compile(r"""^\s*color_space:\s*["']?BGR\b""", re.MULTILINE)


def in_rgb(values: Any, path: Path) -> Any:
    """What a file holds, with the first convolution of a CVLFace network for images in RGB."""
    first = next((k for k in _CVLFACE if isinstance(values, dict) and k in values), None)
    settings = path.with_suffix(".yaml")
    if first is None or not settings.is_file():
        return values
    with open(settings, errors="replace") as file:
        flipped = _BGR.search(file.read(100_000)) is not None
    return {**values, first: _flipped(values[first])} if flipped else values


def _flipped(weight: Any) -> Any:
    """A convolution for the other order of colors; what is none is named when it is loaded."""
    return weight.flip(1) if isinstance(weight, Tensor) and weight.dim() == 4 else weight


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict, renamed if it is one of these programs."""
    adaface = f"model.{_FIRST}" in state
    if adaface or any(name in state for name in _CVLFACE):
        prefix = "model." if adaface else "net."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if _FIRST not in state:
        return state
    if adaface:
        state[_FIRST] = _flipped(state[_FIRST])
    # A stage begins where the number of channels changes; the first shortcut has no weights.
    numbers = sorted({int(k.split(".")[1]) for k in state if re.match(r"body\.\d{1,4}\.", k)})
    blocks, stage, place = {}, 1, -1
    for number in numbers:
        begins = number > 0 and f"body.{number}.shortcut_layer.0.weight" in state
        stage, place = (stage + 1, 0) if begins else (stage, place + 1)
        blocks[str(number)] = f"layer{stage}.{place}."
    found = {}
    for key, value in state.items():
        body, _, rest = key.removeprefix("body.").partition(".")
        inside, names = key.startswith("body.") and body in blocks, _ENDS
        before = ""
        if inside:
            before, key, names = blocks[body], rest, _BLOCK
        old = next((old for old in names if key.startswith(f"{old}.")), "")
        found[before + names.get(old, "") + key.removeprefix(old)] = value
    return found
