"""IResNet, IR and LResNet-E-IR, whose state dicts have the shapes of the published models.

Names are those of IResNet and LResNet, too, whose published checkpoints load unchanged; those of IR
are renamed (:mod:`train.backbones.foreign`). At ``input_size`` other than 112 only the last linear
layer differs.

Sources: Duta et al., "Improved Residual Networks for Image and Video Recognition", ICPR 2020, as in
deepinsight/insightface, recognition/arcface_torch. Li et al., "UniTSFace: Unified Threshold
Integrated Sample-to-Sample Loss for Face Recognition", NeurIPS 2023 (arXiv 2311.02523),
CVI-SZU/UniTSFace; the same network serves CVI-SZU/UniFace.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Stages = tuple[int, int, int, int]  # blocks in each of the four stages


def float32_features(x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    """Features stay float32 under autocast: rounding them would move every cosine."""
    with torch.autocast(x.device.type, enabled=False):
        return norm(torch.flatten(linear(x.to(linear.weight.dtype)), 1))


def fixed_scale(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """The scale of every coordinate stays 1: the losses see cosines only, and a learned scale per
    coordinate would undo the whitening that this last BatchNorm is there for.
    """
    norm.weight.requires_grad_(False)
    return norm


class Block(nn.Module):
    """BN - conv - BN - PReLU - conv(stride) - BN plus a shortcut, with no activation after."""

    norms: ClassVar[tuple[str, str, str]] = ("bn1", "bn2", "bn3")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        first, second, third = self.norms
        self.add_module(first, nn.BatchNorm2d(in_channels))
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.add_module(second, nn.BatchNorm2d(channels))
        self.prelu = nn.PReLU(channels)
        self.conv2 = self.convolution(channels, channels, stride)
        self.add_module(third, nn.BatchNorm2d(channels))
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                self.shortcut(in_channels, channels, stride), nn.BatchNorm2d(channels)
            )

    @staticmethod
    def convolution(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)

    @staticmethod
    def shortcut(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, channels, H', W')
        first, second, third = (getattr(self, name) for name in self.norms)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.prelu(second(self.conv1(first(x))))
        return third(self.conv2(y)) + shortcut


class ResNet(nn.Module):
    """The stages that both families share."""

    block: ClassVar[type[Block]] = Block

    def __init__(self, stages: Stages, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = self._stage(64, 64, stages[0])
        self.layer2 = self._stage(64, 128, stages[1])
        self.layer3 = self._stage(128, 256, stages[2])
        self.layer4 = self._stage(256, 512, stages[3])

    def _stage(self, in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        rest = (self.block(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(self.block(in_channels, channels, 2), *rest)

    def trunk(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, 512, S', S')
        x = self.prelu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class IResNet(ResNet):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``."""

    STAGES: ClassVar[dict[str, Stages]] = {
        "iresnet18": (2, 2, 2, 2),
        "iresnet34": (3, 4, 6, 3),
        "iresnet50": (3, 4, 14, 3),
        "iresnet100": (3, 13, 30, 3),
        "iresnet200": (6, 26, 60, 6),
    }

    def __init__(
        self, stages: Stages, input_size: int, dropout: float, embedding_size: int
    ) -> None:
        super().__init__(stages, input_size)
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        side = -(-input_size // 16)  # every stage's stride-2, padding-1 convolution rounds up
        self.fc = nn.Linear(512 * side * side, embedding_size)
        self.features = fixed_scale(nn.BatchNorm1d(embedding_size))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.dropout(torch.flatten(self.bn2(self.trunk(x)), 1))
        return float32_features(x, self.fc, self.features)


class IRNet(IResNet):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``.

    An IResNet whose very first shortcut takes every other pixel, and whose features have no learned
    mean. Source: mk-minchul/AdaFace, net.py, mode "ir", also in mk-minchul/CVLface, models/iresnet.
    """

    STAGES: ClassVar[dict[str, Stages]] = {
        "ir18": (2, 2, 2, 2),
        "ir34": (3, 4, 6, 3),
        "ir50": (3, 4, 14, 3),
        "ir101": (3, 13, 30, 3),
    }

    def __init__(self, stages: Stages, *sizes: Any) -> None:
        super().__init__(stages, *sizes)
        self.layer1[0].downsample = nn.MaxPool2d(1, 2)
        self.features = nn.BatchNorm1d(self.fc.out_features, affine=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


class UnpaddedBlock(Block):
    norms = ("bn0", "bn1", "bn2")

    @staticmethod
    def convolution(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
        if stride == 1:
            return Block.convolution(in_channels, channels, stride)
        return nn.Conv2d(in_channels, channels, stride, stride=stride, bias=False)

    shortcut = convolution


class LResNet(ResNet):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``.

    An IResNet whose strides are 2 x 2 convolutions without padding. The state dict is the published
    model's without its losses. The published evaluation adds the features of an image and of its
    mirror image, which is left to evaluation here. The published training also keeps the slopes of
    the PReLUs above 0.01, which this one does not.
    """

    STAGES: ClassVar[dict[str, Stages]] = {
        "lresnet50e_ir": (3, 4, 14, 3),
        "lresnet100e_ir": (3, 13, 30, 3),
        "lresnet200e_ir": (3, 33, 60, 3),
    }
    block = UnpaddedBlock

    def __init__(
        self, stages: Stages, input_size: int, dropout: float, embedding_size: int
    ) -> None:
        super().__init__(stages, input_size)
        self.bn4 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc5 = nn.Conv2d(512, embedding_size, input_size // 16, bias=False)
        self.bn5 = fixed_scale(nn.BatchNorm1d(embedding_size))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=1)
            elif isinstance(module, Block):  # at first every block is its shortcut, as published
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        return float32_features(self.dropout(self.bn4(self.trunk(x))), self.fc5, self.bn5)
