"""After a training with several centers per class: one center each, without the noisy samples.

Of the K centers of a class one, the dominant one, is nearest to most of its samples; the others
gather samples of a wrong label or of low quality. Once the network has learned, the paper drops all
centers but the dominant one and all samples that are farther from it than 75 degrees, and trains
again with one center per class on what is left.

Source: Deng et al., "Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces",
ECCV 2020, section 3; published in insightface (recognition/subcenter_arcface/drop.py), which
keeps a sample whose cosine is above that of the angle and leaves out classes without any.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import validate
from .backends.reference import normalize_rows

#: Rows that are compared with their centers at once.
BLOCK = 4096


class Dominant(NamedTuple):
    """What :func:`keep_dominant` keeps.

    Attributes:
        weight: (C, D) the dominant center of every class, as it is in the weights; a class without
            samples has its first one.
        center: (C,) int64, which of the K it is.
        kept: (N,) bool, samples that are within the angle of their class's dominant center. False
            for an ignored sample.
        cosine: (N,) float32 cosine of every sample with that center; NaN for an ignored one.
    """

    weight: Tensor
    center: Tensor
    kept: Tensor
    cosine: Tensor


@torch.no_grad()
def keep_dominant(
    weight: Tensor, feats: Tensor, labels: Tensor, *, angle: float = 75.0
) -> Dominant:
    """The dominant center of every class, and the samples that are near it.

    Args:
        weight: (C, K, D) class weights, not normalized: ``weight`` of a module with ``centers``.
        feats: (N, D) features of the training set by the trained network, not normalized. They are
            read in blocks, and may lie in a mapped file.
        labels: (N,) integer classes in [0, C); -1 ignores the row.
        angle: in degrees, in [0, 180]; a sample farther than this from its class's dominant center
            is noisy.

    Returns:
        Centers and samples to train again with: ``weight`` has the shape of a module without
        ``centers``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or range.
    """
    validate.is_tensor("weight", weight)
    if weight.dim() != 3 or 0 in weight.shape[1:]:
        raise ValueError(f"weight must have shape (C, K, D), got {tuple(weight.shape)}")
    validate.features("feats", feats)
    validate.features("weight", weight[:, 0], like=feats)
    validate.labels("labels", labels, len(feats), feats)
    validate.number("angle", angle, at_least=0.0, at_most=180.0)
    classes, count, _ = weight.shape
    labels = labels.to(torch.int64)
    validate.in_range("labels", labels, -1, classes)
    cosines = _cosines(weight, feats, labels)
    found = labels >= 0
    nearest = cosines[found].argmax(dim=1)
    votes = torch.bincount(labels[found] * count + nearest, minlength=classes * count)
    # The first of equal ones.
    center = votes.view(classes, count).argmax(dim=1)
    cosine = torch.full_like(cosines[:, 0], torch.nan)
    cosine[found] = cosines[found].gather(1, center[labels[found], None])[:, 0]
    kept = cosine > math.cos(math.radians(angle))
    return Dominant(weight[torch.arange(classes), center], center, kept, cosine)


def _cosines(weight: Tensor, feats: Tensor, labels: Tensor) -> Tensor:
    """(N, K) float32 cosines of samples with the centers of their class; 0 for an ignored one."""
    count = weight.shape[1]
    cosines = torch.zeros(len(feats), count, device=feats.device)
    for first in range(0, len(feats), BLOCK):
        block = slice(first, first + BLOCK)
        rows = (labels[block] >= 0).nonzero()[:, 0]
        unit = normalize_rows(feats[block][rows].float())
        centers = weight[labels[block][rows]].float().flatten(0, 1)
        products = normalize_rows(centers).view(-1, count, weight.shape[2]) @ unit.unsqueeze(2)
        cosines[first + rows] = products.squeeze(2)
    return cosines
