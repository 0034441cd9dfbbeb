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
from train.errors import UserError

PREFIX = "timm:"
# Options that the harness sets itself.
RESERVED = ("pretrained", "num_classes", "in_chans", "checkpoint_path")


def import_timm(name: str) -> ModuleType:
    try:
        import timm
    # A torchvision that was built for another torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"model.name={name}: timm needs torchvision, and cannot be imported here: {error}"
        ) from error
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
        input_size: int = 112,
        dropout: float = 0.0,
        embedding_size: int = 512,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        timm, options = import_timm(name), options or {}
        for key in RESERVED:
            if key in options:
                raise UserError(f"model.options.{key}: not for the user to choose (model.weights?)")
        try:
            model = timm.create_model(
                name.removeprefix(PREFIX), pretrained=False, num_classes=0, **options
            )
        except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            given = f" with model.options={options}" if options else ""
            raise UserError(f"model.name={name}{given}: {error}") from error
        self.model = model
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self._width(name), embedding_size)
        self.features = fixed_scale(nn.BatchNorm1d(embedding_size))

    @torch.no_grad()
    def _width(self, name: str) -> int:
        """Numbers that the model makes of an image, found by showing it one."""
        size = self.input_size
        self.model.eval()
        try:
            output = self.model(torch.zeros(1, 3, size, size))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"model.name={name} takes no images of model.input_size={size} "
                f"(is it model.options.img_size={size} that is missing?): {error}"
            ) from error
        finally:
            self.model.train()
        return int(output.numel())

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.dropout(torch.flatten(self.model(x), 1))
        return float32_features(x, self.fc, self.features)
