"""GhostFaceNet V1: GhostNet with PReLU and a global depthwise convolution in place of pooling.

Half of the channels of a Ghost module are a 3 x 3 depthwise convolution of the other half.

Sources: Alansari et al., "GhostFaceNets: Lightweight Face Recognition Model From Cheap Operations",
IEEE Access 11, 2023: GhostFaceNetV1-1, of width 1.3. Han et al., "GhostNet: More Features from
Cheap Operations", CVPR 2020 (arXiv 1911.11907), table 1. The published weights are Keras's, whose
padding and gate differ, and are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.backbones.resnets import fixed_scale, float32_features

WIDTH = 1.3
# Kernel, channels within and after the block, squeeze and excitation, stride.
BLOCKS: tuple[tuple[int, int, int, bool, int], ...] = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 512, 160, True, 1),
)


def channels_of(count: float) -> int:
    """A multiple of 4 that is not below nine tenths of ``count``."""
    rounded = max(4, int(count + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * count else rounded


def convolution(
    channels: int, out: int, kernel: int = 1, stride: int = 1, *, act: bool = False
) -> list[nn.Module]:
    """Convolution, depthwise where the kernel is larger than a pixel, BatchNorm, maybe PReLU."""
    groups = channels if kernel > 1 else 1
    weights = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [weights, nn.BatchNorm2d(out), *([nn.PReLU(out)] if act else [])]


class GhostModule(nn.Module):
    def __init__(self, channels: int, out: int, *, act: bool) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(*convolution(channels, out // 2, act=act))
        self.cheap_operation = nn.Sequential(*convolution(out // 2, out // 2, 3, act=act))

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, out, H, W)
        x = self.primary_conv(x)
        return torch.cat([x, self.cheap_operation(x)], dim=1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = channels_of(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act = nn.PReLU(reduced)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.conv_expand(self.act(self.conv_reduce(pooled))))


class GhostBottleneck(nn.Module):
    def __init__(
        self, channels: int, within: int, out: int, kernel: int, stride: int, *, excite: bool
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(channels, within, act=True)
        depthwise = convolution(within, within, kernel, stride) if stride > 1 else []
        self.conv_dw = nn.Sequential(*depthwise)
        self.se = SqueezeExcite(within) if excite else nn.Identity()
        self.ghost2 = GhostModule(within, out, act=False)
        same = channels == out and stride == 1
        both = convolution(channels, channels, kernel, stride) + convolution(channels, out)
        self.shortcut = nn.Sequential(*([] if same else both))

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, out, H', W')
        return self.ghost2(self.se(self.conv_dw(self.ghost1(x)))) + self.shortcut(x)


class GhostFaceNet(nn.Module):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``."""

    def __init__(self, input_size: int, dropout: float, embedding_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        channels = channels_of(16 * WIDTH)
        stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(channels), nn.PReLU(channels))
        blocks = []
        for kernel, within, out, excite, stride in BLOCKS:
            within, out = channels_of(within * WIDTH), channels_of(out * WIDTH)
            blocks.append(GhostBottleneck(channels, within, out, kernel, stride, excite=excite))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        last = channels_of(BLOCKS[-1][1] * WIDTH)
        self.conv_head = nn.Sequential(*convolution(channels, last, act=True))
        side = -(-input_size // 16)  # every stride-2 convolution rounds up
        self.gdc = nn.Sequential(
            nn.Conv2d(last, last, side, groups=last, bias=False), nn.BatchNorm2d(last)
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(last, embedding_size, bias=False)
        self.features = fixed_scale(nn.BatchNorm1d(embedding_size))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                mode = "fan_in" if module.groups > 1 else "fan_out"
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = torch.flatten(self.gdc(self.conv_head(self.blocks(self.stem(x)))), 1)
        return float32_features(self.dropout(x), self.fc, self.features)
