"""A trained model out of a checkpoint, for the commands that evaluate or export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train import checkpoint
from train.backbones import backbone_names
from train.backbones.weights import find_state, recognize, sizes
from train.config import COMMAND_LINE, Config, make_config, of_a_run, parse_overrides
from train.data.image_list import whole
from train.data.loader import ImageSource
from train.data.records import Records
from train.distributed import choose_device
from train.errors import UserError
from train.evaluation.embed import BATCH_SIZE, embed
from train.evaluation.test_sets import open_uncached


@dataclass(frozen=True)
class Model:
    backbone: nn.Module  # in evaluation mode: (N, 3, S, S) in [-1, 1] to (N, D)
    config: Config
    threshold: float | None  # learned unified threshold b / s, a cosine
    device: torch.device
    batch_size: int = BATCH_SIZE
    flip: bool = True

    def embed(self, source: ImageSource) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Flip-summed features (N, D) and labels (N,)."""
        return embed(self.backbone, source, self.device, batch_size=self.batch_size, flip=self.flip)

    def embed_records(self, records: Records) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(N, D) flip-summed features, and which of them are of their own image.

        With ``data.on_error=skip`` the others are some other image's; otherwise they are an error.
        """
        source = open_uncached(self.config, whole(records, [0] * len(records), [""]))
        return self.embed(source)[0], source.readable()


def evaluation_config(overrides: Sequence[str], *layers: tuple[str, dict[str, Any]]) -> Config:
    """``layers``, and ``key=value`` of the command line over them.

    How images were read in training, and on which device, is no part of a model.
    """
    plain = Config()
    keys = {
        "data": {name: getattr(plain.data, name) for name in ("on_error", "cache", "workers")},
        "train": {"device": plain.train.device},
    }
    return make_config(*layers, ("defaults", keys), (COMMAND_LINE, parse_overrides([*overrides])))


def load_model(
    path: str | Path, overrides: Sequence[str] = (), batch_size: int = BATCH_SIZE
) -> Model:
    """The backbone as it was trained, with the architecture of its checkpoint.

    A file that is no checkpoint of this harness may hold published weights, whose architecture is
    recognized by names and shapes.
    """
    path, values = checkpoint.read_any(Path(path))
    threshold = None
    if checkpoint.is_run(values):
        config = evaluation_config(overrides, (str(path), of_a_run(values["config"])))
        threshold = values["trainer"].get("threshold")
    else:
        config = evaluation_config(overrides, (str(path), {"model": _published(values, path)}))
    model = config.model
    checkpoint.check_backbone(values, path=path, config=config, averaged=True)
    backbone = model.build()
    # What was evaluated in training: the average over steps, if there is one.
    checkpoint.load_backbone(backbone, values, path=path, config=config, averaged=True)
    device = choose_device(config.train.device, 0)
    if model.channels_last:  # as in training: the same kernels, so the same metrics
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(backbone.to(device).eval(), config, threshold, device, batch_size)


def _published(values: Any, path: Path) -> dict[str, Any]:
    """The ``model`` section of published weights, or of what train/convert.py has written."""
    state = find_state(values, averaged=True) or {}
    name, found = recognize(state), sizes(state)
    if name is None or found is None:
        names = ", ".join(backbone_names())
        raise UserError(f"{path} is neither a checkpoint nor the weights of one of {names}")
    return {"name": name, "input_size": found[0], "embedding_size": found[1]}
