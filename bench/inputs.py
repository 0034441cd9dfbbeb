"""Tensors of a workload, as at the start of training or as from a trained model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import SCALE, Workload

IMAGES_PER_IDENTITY = 4
# Trained models have a spread of cosines; without it no row would be hard and have a gradient.
TARGET_SPREAD = 0.05
TARGET_RANGE = (0.4, 0.95)
# Thresholds and probabilities are computed on these; the rows are alike.
SAMPLE_ROWS = 64


def make_inputs(workload: Workload, device: str = "cpu") -> dict[str, Tensor]:
    """Keyword tensors of a loss; features of norm about sqrt(D), as random directions have it."""
    generator = torch.Generator(device).manual_seed(0)

    def directions(count: int) -> Tensor:
        return torch.randn(count, workload.size, generator=generator, device=device)

    # A memory or class weights have one column per identity.
    identities = workload.columns or max(workload.rows // IMAGES_PER_IDENTITY, 1)
    labels = torch.randint(identities, (workload.rows,), generator=generator, device=device)
    feats = directions(workload.rows)
    columns = directions(workload.columns) if workload.columns else None
    if workload.trained:
        spread = torch.randn(workload.rows, generator=generator, device=device)
        cosine = (workload.target_cosine + TARGET_SPREAD * spread).clamp(*TARGET_RANGE)[:, None]
        if columns is None:
            # Two samples at sqrt(t) from their identity's center are at t from each other.
            feats = _tilted(feats, directions(identities)[labels], cosine.sqrt())
        else:
            feats = _tilted(feats, columns[labels], cosine)
    dtype = workload.dtype(device)
    if workload.topology == "towers":
        return _towers(workload, feats.to(dtype), columns.to(dtype))
    tensors = {"feats": feats.to(dtype).requires_grad_(), "labels": labels}
    if workload.topology == "class":
        tensors["weight"] = columns.to(dtype).requires_grad_()
    elif workload.topology == "memory":
        tensors["memory"] = columns.to(dtype)
        tensors["memory_labels"] = torch.arange(identities, device=device)
    if workload.loss != "margin_softmax":
        b = _best_threshold(workload, tensors) if workload.trained else _first_threshold(workload)
        tensors["b"] = torch.tensor(b, device=device, requires_grad=True)
    return tensors


def _towers(workload: Workload, feats: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Random directions, with scale and bias as at the start of training."""
    found = {"feats": feats, "texts": texts}
    numbers = {"clip": {"scale": 1 / 0.07}, "siglip": {"scale": 10.0, "bias": -10.0}}
    for name, value in numbers[workload.loss].items():
        found[name] = torch.tensor(value, device=feats.device)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def _tilted(noise: Tensor, centers: Tensor, cosine: Tensor) -> Tensor:
    """Features at the cosines (N, 1) to their centers, in the direction of the noise otherwise."""
    center = F.normalize(centers, dim=1)
    across = F.normalize(noise - (noise * center).sum(dim=1, keepdim=True) * center, dim=1)
    unit = cosine * center + (1.0 - cosine * cosine).sqrt() * across
    return unit * noise.norm(dim=1, keepdim=True)


def _first_threshold(workload: Workload) -> float:
    """The log-sum-exp of a row's negatives, as the published initial threshold of USS takes it.

    Cosines of random directions have the variance 1/D.
    """
    return math.log(workload.columns or workload.rows) + SCALE * SCALE / (2.0 * workload.size)


@torch.no_grad()
def sample_cosines(workload: Workload, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines of the first rows with all columns, and which are positive; (n, M) both.

    A feature's pair with itself is left out: its cosine is NaN.
    """
    rows = F.normalize(tensors["feats"][:SAMPLE_ROWS].float(), dim=1)
    labels = tensors["labels"][:SAMPLE_ROWS]
    columns = tensors.get("weight", tensors.get("memory", tensors["feats"]))
    # No normalized copy: columns may be gigabytes.
    norms = torch.linalg.vector_norm(columns, dim=1, dtype=torch.float32)
    cosines = (rows.to(columns.dtype) @ columns.T).float().div_(norms)
    column_labels = tensors.get("memory_labels")
    if workload.topology == "pair":
        column_labels = tensors["labels"]
        cosines[torch.arange(len(rows)), torch.arange(len(rows))] = torch.nan
    elif workload.topology == "class":
        column_labels = torch.arange(len(columns), device=columns.device)
    return cosines, labels[:, None] == column_labels[None, :]


def _best_threshold(workload: Workload, tensors: dict[str, Tensor]) -> float:
    """The b at which the increasing derivative by b is 0, by bisection."""
    cosines, positive = sample_cosines(workload, tensors)
    usable = ~cosines.isnan()
    targets = SCALE * (cosines[positive & usable] - workload.margin)
    others = SCALE * cosines[~positive & usable]
    low, high = -2.0 * SCALE, 2.0 * SCALE
    for _ in range(30):
        b = 0.5 * (low + high)
        if torch.sigmoid(b - targets).sum() < torch.sigmoid(others - b).sum():
            low = b
        else:
            high = b
    return 0.5 * (low + high)


def negative_prob(workload: Workload, tensors: dict[str, Tensor]) -> float:
    """Mean probability of the negatives in the softmax, the mass of their gradients."""
    cosines, positive = sample_cosines(workload, tensors)
    target = SCALE * (cosines[positive] - workload.margin)
    negatives = (SCALE * cosines).masked_fill_(positive, -torch.inf).logsumexp(dim=1)
    return float(torch.sigmoid(negatives - target).mean())
