"""A model to use: a run, its checkpoints, published weights, or an exported ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train import checkpoint
from train.errors import UserError, reported
from train.evaluation.model import Model, evaluation_config, load_model
from train.run_folder import EVALUATION
from train.small_files import parse_json, read_text


class OnnxBackbone(nn.Module):
    """(N, 3, S, S) RGB, (x - 127.5) / 127.5, to (N, D), by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with reported(f"{path} needs onnxruntime: pip install onnxruntime", ImportError):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with reported(f"cannot read {path}"):
            content = path.read_bytes()
        # Its exceptions have no common base.
        with reported(f"onnxruntime cannot load {path}", Exception):
            providers = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        given, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = given[0].shape if len(given) == 1 else []
        square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
        if not square or not isinstance(shape[2], int) or len(outputs) != 1:
            raise UserError(f"{path}: expected (N, 3, S, S) images to features, takes {shape}")
        self.input, self.size, self.one_by_one = given[0].name, shape[2], shape[0] == 1

    def forward(self, images: Tensor) -> Tensor:
        parts = images.split(1) if self.one_by_one else (images,)
        with reported("onnxruntime", Exception):
            found = [self.session.run(None, {self.input: part.numpy()})[0] for part in parts]
        return torch.from_numpy(np.concatenate(found)).flatten(1)


def load(path: Path, overrides: Sequence[str], batch_size: int, flip: bool) -> Model:
    """The model, whose features are those of the image alone without ``flip``."""
    if path.suffix != ".onnx":
        return replace(load_model(path, overrides, batch_size), flip=flip)
    backbone = OnnxBackbone(path)
    config = evaluation_config(overrides, (str(path), {"model": {"input_size": backbone.size}}))
    # Of models that are exported here; others have no such entry.
    entries = backbone.session.get_modelmeta().custom_metadata_map
    try:
        threshold = float(entries["cosine_threshold"])
    except (KeyError, ValueError):
        threshold = None
    return Model(backbone.eval(), config, threshold, torch.device("cpu"), batch_size, flip)


def threshold_of(path: Path, model: Model, given: float | None) -> tuple[float, str] | None:
    """The cosine from which two images count as one person, and where it comes from."""
    if given is not None:
        return given, "--threshold"
    if model.threshold is not None:
        return model.threshold, "the unified threshold that the model has learned"
    runs = [path] if path.is_dir() else []
    runs += [path.parent.parent] if path.parent.name == checkpoint.LAST.parent.name else []
    for run in runs:
        if (run / EVALUATION).is_file():
            values: Any = parse_json(read_text(run / EVALUATION), run / EVALUATION)
            found = values.get("best_threshold") if isinstance(values, dict) else None
            if isinstance(found, float) and np.isfinite(found):
                return found, "the best one of the held-out identities"
    return None
