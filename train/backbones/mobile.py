"""MobileFaceNet, whose state dict has the names and shapes of insightface's published models.

Sources: Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on
Mobile Devices", CCBR 2018 (arXiv 1804.07573), and for the wider networks
deepinsight/insightface, recognition/arcface_torch ("mbf" and "mbf_large").
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from train.backbones.resnets import fixed_scale, float32_features


class Layers(nn.Module):
    """Modules one after another, with ``residual`` plus the input."""

    def __init__(self, *layers: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def convolution(channels: int, out: int, kernel: int = 1, **options: int) -> Layers:
    """Convolution, BatchNorm and PReLU."""
    return Layers(*_linear(channels, out, kernel, **options), nn.PReLU(out))


def _linear(channels: int, out: int, kernel: int = 1, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, bias=False, **options), nn.BatchNorm2d(out)]  # type: ignore[arg-type]


def bottleneck(channels: int, out: int, width: int, stride: int = 1) -> Layers:
    """Pointwise to ``width`` channels, 3 x 3 depthwise, pointwise without activation."""
    return Layers(
        convolution(channels, width),
        convolution(width, width, 3, stride=stride, groups=width, padding=1),
        Layers(*_linear(width, out)),
        residual=stride == 1,
    )


class GlobalDepthwise(nn.Module):
    """(N, 512, side, side) to (N, D): one weight per channel and place, then a linear layer."""

    def __init__(self, side: int, dropout: float, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Layers(*_linear(512, 512, side, groups=512)),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            fixed_scale(nn.BatchNorm1d(embedding_size)),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        depthwise, flatten, linear, norm = self.layers
        return float32_features(self.dropout(flatten(depthwise(x))), linear, norm)


class MobileFaceNet(nn.Module):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``.

    Channels between bottlenecks are ``scale`` times the paper's, those within are the paper's. The
    scale of the last BatchNorm, which insightface trains, stays as it is initialized or loaded.
    """

    # Scale, and blocks in each of the four stages, by name.
    STAGES: ClassVar[dict[str, tuple[int, ...]]] = {
        "mobilefacenet": (2, 1, 4, 6, 2),
        "mobilefacenet_1x": (1, 1, 4, 6, 2),  # the paper's
        "mobilefacenet_large": (4, 2, 8, 12, 4),
    }

    def __init__(
        self, stages: tuple[int, ...], input_size: int, dropout: float, embedding_size: int
    ) -> None:
        super().__init__()
        self.input_size = input_size
        scale, *blocks = stages
        narrow, wide = 64 * scale, 128 * scale

        def stage(channels: int, width: int, count: int) -> Layers:
            return Layers(*(bottleneck(channels, channels, width) for _ in range(count)))

        first = convolution(narrow, narrow, 3, groups=64, padding=1)
        self.layers = nn.Sequential(
            convolution(3, narrow, 3, stride=2, padding=1),
            first if blocks[0] == 1 else stage(narrow, 128, blocks[0]),
            bottleneck(narrow, narrow, 128, stride=2),
            stage(narrow, 128, blocks[1]),
            bottleneck(narrow, wide, 256, stride=2),
            stage(wide, 256, blocks[2]),
            bottleneck(wide, wide, 512, stride=2),
            stage(wide, 256, blocks[3]),
        )
        self.conv_sep = convolution(wide, 512)
        side = -(-input_size // 16)  # every stride-2 convolution rounds up
        self.features = GlobalDepthwise(side, dropout, embedding_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        return self.features(self.conv_sep(self.layers(x)))
