"""A trained model out of a checkpoint, for the commands that judge or export it."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import checkpoint
from train.backbones import build_backbone
from train.backbones.weights import find_state, recognize, sizes
from train.config import COMMAND_LINE, Config, make_config, of_a_run
from train.data.image_list import ImageList
from train.data.loader import ImageSource, open_images
from train.distributed import choose_device
from train.errors import UserError
from train.evaluation.embed import BATCH_SIZE


@dataclass(frozen=True)
class Model:
    backbone: nn.Module  # in evaluation mode: (N, 3, S, S) in [-1, 1] to (N, D)
    config: Config
    threshold: float | None  # learned unified threshold b / s, a cosine
    device: torch.device
    path: Path


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``low`` on."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < low:
            raise ArgumentTypeError(f"expected a whole number of at least {low}, got '{text}'")
        return int(text)

    return parse


def add_model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="checkpoint file or folder, a run folder (its last one), or published weights",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model.name, where that of the checkpoint is fetched"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--batch-size", type=at_least(1), default=BATCH_SIZE, help="images embedded at a time"
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=2,
        help="decoding processes, where images are not kept in memory",
    )
    parser.add_argument(
        "--on-error",
        default="fail",
        choices=("fail", "skip"),
        help="what to do of an unreadable image",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for figures (JSON); pairs, thresholds and verification add plots",
    )


def load_model(arguments: Namespace) -> Model:
    """The backbone as it was trained, with the architecture of its checkpoint.

    What is no checkpoint of this harness may be published weights, of an architecture that their
    names and shapes tell.
    """
    path, values = checkpoint.read_any(Path(arguments.checkpoint))
    threshold = None
    if checkpoint.is_run(values):
        typed = getattr(arguments, "model", None)
        layers = [(COMMAND_LINE, {"model": {"name": typed}})] if typed else []
        config = make_config((str(path), of_a_run(values["config"])), *layers)
        threshold = values["trainer"].get("threshold")
    else:
        config = _published(values, path)
    model = config.model
    checkpoint.check_backbone(values, path=path, config=config, averaged=True)
    backbone = build_backbone(
        model.name, model.input_size, model.dropout, model.embedding_size, model.options
    )
    # What was evaluated in training: the average over steps, if there is one.
    checkpoint.load_backbone(backbone, values, path=path, config=config, averaged=True)
    device = choose_device(arguments.device, 0)
    if model.channels_last:  # as in training: the same kernels, so the same figures
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(backbone.to(device).eval(), config, threshold, device, path)


def _published(values: Any, path: Path) -> Config:
    """Of insightface, UniTSFace or UniFace, or what train/convert.py has written."""
    state = find_state(values, averaged=True) or {}
    name, found = recognize(state), sizes(state)
    if name is None or found is None:
        raise UserError(f"{path} is no checkpoint, and no weights of a backbone known here")
    model = {"name": name, "input_size": found[0], "embedding_size": found[1]}
    return make_config((str(path), {"model": model}))


def open_images_of(model: Model, images: ImageList, arguments: Namespace) -> ImageSource:
    """Images at the model's size."""
    return open_images(
        images,
        model.config.model.input_size,
        on_error=arguments.on_error,
        workers=arguments.workers,
        max_pixels=model.config.data.max_pixels,
    )
