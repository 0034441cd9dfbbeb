"""Conv-4, the small network of few-shot learning, for images of few pixels and minutes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.backbones.resnets import fixed_scale, float32_features

CHANNELS = 32


class Conv4(nn.Module):
    """(N, 3, S, S) normalized images to (N, D) float32 features, S = ``input_size``.

    Four blocks of a 3 x 3 convolution, BatchNorm, ReLU and 2 x 2 max-pooling, as in Vinyals et al.,
    "Matching Networks for One Shot Learning", NeurIPS 2016, and the head of the other backbones.
    """

    def __init__(self, input_size: int, dropout: float, embedding_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        blocks = (
            nn.Sequential(
                nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False),
                nn.BatchNorm2d(CHANNELS),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for channels in (3, CHANNELS, CHANNELS, CHANNELS)
        )
        self.trunk = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(CHANNELS * (input_size // 16) ** 2, embedding_size)
        self.features = fixed_scale(nn.BatchNorm1d(embedding_size))

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, D)
        x = self.dropout(torch.flatten(self.trunk(x), 1))
        return float32_features(x, self.fc, self.features)
