"""One rank of a sharded CosFace head with its SGD, in eager PyTorch.

Written by us after how such heads work: one N x K matrix that is cosines, then probabilities, then
gradients, in place; of a sample of the classes, weights and momentum are gathered into copies,
stepped there and written back. Where ranks would exchange maxima and sums, nothing happens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bfloat16_gemms(device: str) -> torch.autocast:
    """bfloat16 autocast over float32 weights on CUDA, as in training there; nothing on the CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


class _Softmax(torch.autograd.Function):
    """Mean CosFace cross-entropy of (N, K) cosines, which it overwrites.

    Rows without a target (-1) have their log-sum-exp as the loss.
    """

    @staticmethod
    def forward(ctx, cosine: Tensor, labels: Tensor, scale: float, margin: float):
        rows = torch.where(labels >= 0)[0]
        targets = labels[rows]
        cosine[rows, targets] -= margin
        logits = cosine.mul_(scale)
        own = logits[rows, targets]
        highest = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
        losses = (highest + total.log()).squeeze(1)
        losses[rows] -= own
        ctx.mark_dirty(cosine)
        ctx.probabilities, ctx.targets, ctx.scale = logits.div_(total), (rows, targets), scale
        return losses.mean(), cosine

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor):
        gradient = ctx.probabilities
        gradient[ctx.targets] -= 1.0
        return gradient.mul_(upstream * (ctx.scale / gradient.shape[0])), None, None, None


class EagerPartialFC:
    """Class weights (C, D), momentum, and a step on them."""

    def __init__(self, weight: Tensor, sample_rate: float, scale: float, margin: float) -> None:
        self.weight, self.momentum = weight, torch.zeros_like(weight)
        self.sample_rate, self.scale, self.margin = sample_rate, scale, margin

    def step(self, feats: Tensor, labels: Tensor, **options: float) -> float:
        """Loss; afterwards ``feats.grad`` is set and the weights have moved.

        Args:
            labels: (N,) rows of the shard, -1: in another.
            options: lr, momentum and weight_decay of SGD.
        """
        index = None
        weight, momentum = self.weight, self.momentum
        if self.sample_rate < 1.0:
            index, labels = self._sample(labels)
            weight, momentum = weight[index], momentum[index]
        parameter = torch.nn.Parameter(weight)
        with bfloat16_gemms(feats.device.type):
            cosine = F.linear(F.normalize(feats, dim=1), F.normalize(parameter, dim=1))
        # The softmax is in float32 on every device.
        cosine = cosine.float()
        loss = _Softmax.apply(cosine.clamp(-1.0, 1.0), labels, self.scale, self.margin)[0]
        loss.backward()
        optimizer = torch.optim.SGD([parameter], **options)
        optimizer.state[parameter]["momentum_buffer"] = momentum
        optimizer.step()
        if index is not None:
            self.weight[index], self.momentum[index] = parameter.detach(), momentum
        return float(loss.detach())

    def _sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = self.weight.shape[0]
        chances = torch.rand(count, device=labels.device)
        positives = labels[labels >= 0].unique()
        chances[positives] = 2.0
        size = max(int(self.sample_rate * count), len(positives))
        index = chances.topk(size).indices.sort().values
        return index, torch.where(labels >= 0, torch.searchsorted(index, labels), -1)
