"""IResNet backbones whose state dicts have the names and shapes of arcface_torch's.

A published checkpoint therefore loads unchanged. At ``input_size`` other than 112 only the
columns of ``fc.weight`` differ.

Source: Duta et al., "Improved Residual Networks for Image and Video Recognition", ICPR 2020, as in
deepinsight/insightface, recognition/arcface_torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BN_EPS = 1e-5

# Blocks in each of the four stages, by name.
STAGES: dict[str, tuple[int, int, int, int]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS)


class ImprovedBlock(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN plus a shortcut, with no activation after."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = _batch_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = _batch_norm(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = _batch_norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                _batch_norm(channels),
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, channels, H', W')
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + shortcut


class IResNet(nn.Module):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``."""

    def __init__(
        self,
        stages: tuple[int, int, int, int],
        input_size: int = 112,
        dropout: float = 0.0,
        embedding_size: int = 512,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = _batch_norm(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = self._stage(64, 64, stages[0])
        self.layer2 = self._stage(64, 128, stages[1])
        self.layer3 = self._stage(128, 256, stages[2])
        self.layer4 = self._stage(256, 512, stages[3])
        self.bn2 = _batch_norm(512)
        self.dropout = nn.Dropout(dropout)
        side = input_size
        for _ in range(4):  # each stage's stride-2, padding-1 convolution rounds up
            side = (side + 1) // 2
        self.fc = nn.Linear(512 * side * side, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=BN_EPS)
        # The scale of every coordinate stays 1: the losses see cosines only, and a learned
        # per-coordinate scale would undo the whitening that this last BatchNorm is there for.
        self.features.weight.requires_grad_(False)
        self._initialize()

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        first = ImprovedBlock(in_channels, channels, stride=2)
        return nn.Sequential(
            first, *(ImprovedBlock(channels, channels, stride=1) for _ in range(blocks - 1))
        )

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        # Features stay float32 under autocast: rounding them would move every cosine.
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))
