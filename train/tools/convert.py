"""Backbone weights of other programs, or of a checkpoint, as a plain state dict.

python -m train convert INPUT OUTPUT [--model NAME] [--to insightface] [--classes FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import checkpoint
from train.backbones import backbone_names, build_backbone
from train.backbones.weights import differences, find_state, recognize, sizes
from train.errors import Parser, UserError, exit_code
from train.starting.foreign_classes import read_class_weights

INSIGHTFACE_SIZES = (112, 512)
INSIGHTFACE_MOBILE = ("mobilefacenet", "mobilefacenet_large")


def run(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train convert",
        description="Write backbone weights as a plain state dict, for model.weights=OUTPUT. INPUT "
        "is a state dict or checkpoint of insightface (arcface_torch), AdaFace, CVLFace, UniTSFace "
        "or UniFace, or a checkpoint or run folder of this harness, of which averaged weights are "
        "preferred. Networks for images in BGR take RGB afterwards.",
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="backbone that INPUT must hold; default: what it holds")
    parser.add_argument(
        "--to",
        choices=("plain", "insightface"),
        default="plain",
        help="insightface: only what its iresnet and mbf classes take, 112 x 112 to 512 numbers",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="write the class weights of arcface_torch, AdaFace or CVLFace, too: (C, D), those of "
        "all ranks' files beside INPUT",
    )
    arguments = parser.parse_args(argv)
    weights = read_classes(arguments.input) if arguments.classes else None
    name, state, shape = read_weights(arguments.input)
    if arguments.model not in (None, name):
        raise UserError(f"--model={arguments.model}: {arguments.input} holds {name}")
    if arguments.to == "insightface":
        check_insightface(name, shape, arguments.input)
    checkpoint.save_atomically(state, arguments.output)
    print(f"{arguments.output}: {name}{_shown(shape)}, {len(state)} tensors")
    if weights is not None:
        checkpoint.save_atomically({"weight": weights}, arguments.classes)
        print(f"{arguments.classes}: weights of {len(weights)} classes, {weights.shape[1]} numbers")
    return 0


def read_classes(path: Path) -> Tensor:
    path, values = checkpoint.read_any(path)
    weights = read_class_weights(values, path)
    if weights is None:
        raise UserError(f"{path} holds no class weights of another program")
    return weights


def read_weights(path: Path) -> tuple[str, dict[str, Any], tuple[int, int] | None]:
    """Name of the backbone, its state dict in float32, and input and embedding size.

    A model of timm is recognized by the configuration in a checkpoint. Its tensors are not checked,
    since that takes timm, and its sizes are not returned.
    """
    path, values = checkpoint.read_any(path)
    state = find_state(values, averaged=True)
    if state is None:
        raise UserError(f"{path} holds no backbone state dict")
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    model = values.get("config", {}).get("model", {}) if "trainer" in values else {}
    if str(model.get("name")).startswith("timm:"):
        return str(model["name"]), state, None
    name = recognize(state)
    if name is None:
        names = ", ".join(backbone_names())
        raise UserError(
            f"{path} holds {len(state)} tensors that are those of none of the backbones {names}"
        )
    found = sizes(state)
    input_size, embedding_size = found or INSIGHTFACE_SIZES
    with torch.device("meta"):
        expected = build_backbone(name, input_size, 0.0, embedding_size).state_dict()
    wrong = differences(state, expected)
    if wrong:
        raise UserError(f"{path} is not quite {name}: {'; '.join(wrong)}")
    # In the order of the module, and no views of larger tensors, which would be saved whole.
    return name, {key: state[key].clone() for key in expected}, found


def check_insightface(name: str, shape: tuple[int, int] | None, path: Path) -> None:
    known = name.startswith("iresnet") or name in INSIGHTFACE_MOBILE
    if not known or shape != INSIGHTFACE_SIZES:
        raise UserError(
            f"--to insightface: {path} holds {name}{_shown(shape)}; its classes are iresnets, "
            "mbf and mbf_large at 112 x 112, 512 features"
        )


def _shown(shape: tuple[int, int] | None) -> str:
    return "" if shape is None else f" at {shape[0]} x {shape[0]}, {shape[1]} features"


if __name__ == "__main__":
    sys.exit(exit_code(run))
