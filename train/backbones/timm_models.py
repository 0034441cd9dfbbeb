"""Any model of timm with an embedding head.

The head is IResNet's: whatever the model returns without its classifier is flattened, mapped to D
coordinates by a linear layer, and whitened by a BatchNorm of fixed scale. By default that is the
model's pooled feature. ``model.options.global_pool=''`` hands over all tokens (or all places of a
map) instead, which keep where in the face they are, as insightface's and LVFace's ViTs do.

Models start untrained: weights for faces come from ``model.weights``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from train.backbones.resnets import fixed_scale, float32_features
from train.errors import UserError, reported

PREFIX = "timm:"
# Options that the harness sets itself.
RESERVED = ("pretrained", "num_classes", "in_chans", "checkpoint_path")
_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError)  # what its models raise


def import_timm(name: str) -> ModuleType:
    failed = f"model.name={name}: timm needs torchvision, and cannot be imported here"
    # A torchvision that was built for another torch raises RuntimeError.
    with reported(failed, ImportError, RuntimeError):
        import timm
    return timm


class TimmBackbone(nn.Module):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``.

    Args:
        name: "timm:" and the model's name in timm.
        options: keywords of ``timm.create_model``, e.g. ``{"img_size": 112, "patch_size": 8}``.
    """

    def __init__(
        self,
        name: str,
        input_size: int,
        dropout: float,
        embedding_size: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.input_size = input_size
        timm = import_timm(name)
        for key in RESERVED:
            if key in options:
                raise UserError(f"model.options.{key}: not for the user to choose (model.weights?)")
        given = f" with model.options={options}" if options else ""
        with reported(f"model.name={name}{given}", OSError, *_ERRORS):
            self.model = timm.create_model(
                name.removeprefix(PREFIX), pretrained=False, num_classes=0, **options
            )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self._width(name), embedding_size)
        self.features = fixed_scale(nn.BatchNorm1d(embedding_size))

    @torch.no_grad()
    def _width(self, name: str) -> int:
        """Numbers that the model makes of an image, found by showing it one."""
        size = self.input_size
        self.model.eval()
        with reported(
            f"model.name={name} takes no images of model.input_size={size} "
            f"(is it model.options.img_size={size} that is missing?)",
            *_ERRORS,
        ):
            output = self.model(torch.zeros(1, 3, size, size))
        self.model.train()
        return int(output.numel())

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.dropout(torch.flatten(self.model(x), 1))
        return float32_features(x, self.fc, self.features)
