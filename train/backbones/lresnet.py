"""UniTSFace's LResNet-E-IR: an IResNet whose strides are 2 x 2 convolutions without padding.

Names and shapes of the state dict are the published model's without its losses. The published
evaluation adds the features of an image and of its mirror image; here that is left to whoever
evaluates. The published training also keeps the slopes of the PReLUs above 0.01, which we do not.

Source: Zhou et al., "UniTSFace: Unified Threshold Integrated Sample-to-Sample Loss for Face
Recognition", NeurIPS 2023, CVI-SZU/UniTSFace; the same network serves CVI-SZU/UniFace.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Blocks in each of the four stages, by name.
STAGES: dict[str, tuple[int, int, int, int]] = {
    "lresnet50e_ir": (3, 4, 14, 3),
    "lresnet100e_ir": (3, 13, 30, 3),
    "lresnet200e_ir": (3, 33, 60, 3),
}


def _convolution(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    size, padding = (3, 1) if stride == 1 else (2, 0)
    return nn.Conv2d(in_channels, channels, size, stride=stride, padding=padding, bias=False)


class Block(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN plus a shortcut, with no activation after."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv1 = _convolution(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = _convolution(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                _convolution(in_channels, channels, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, channels, H', W')
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        return self.bn2(self.conv2(y)) + shortcut


class LResNet(nn.Module):
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
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = self._stage(64, 64, stages[0])
        self.layer2 = self._stage(64, 128, stages[1])
        self.layer3 = self._stage(128, 256, stages[2])
        self.layer4 = self._stage(256, 512, stages[3])
        self.bn4 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc5 = nn.Conv2d(512, embedding_size, input_size // 16, bias=False)
        self.bn5 = nn.BatchNorm1d(embedding_size)
        self.bn5.weight.requires_grad_(False)  # as IResNet's last scale
        self._initialize()

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        first = Block(in_channels, channels, stride=2)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=1)
            elif isinstance(module, Block):  # at first every block is its shortcut, as published
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn4(x))
        # Features stay float32 under autocast: rounding them would move every cosine.
        with torch.autocast(x.device.type, enabled=False):
            return self.bn5(torch.flatten(self.fc5(x.to(self.fc5.weight.dtype)), 1))
