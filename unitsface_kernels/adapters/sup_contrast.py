"""SupContrast's loss: its constructor, ``loss(features, labels, mask)`` and numbers.

Features are divided by their norms, which SupContrast's networks do before the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..backends.reference import normalize_rows
from ..functional.matching import match
from .metric_learning import pairs


class SupConLoss(nn.Module):
    r"""SupCon over several views of every sample (Khosla et al., NeurIPS 2020, eq. 2).

    The mean over anchors i, of all samples and views or of the first views, of

    .. math:: \frac{T}{T_0} \Big(\log \sum_{j \ne i} e^{c_{ij} / T}
        - \frac{1}{|P(i)|} \sum_{p \in P(i)} c_{ip} / T\Big)

    with j over all other samples and views. An anchor without a positive has the loss 0 and counts.

    Args:
        temperature: T > 0.
        contrast_mode: "all": every view is an anchor; "one": the first view of every sample.
        base_temperature: T_0 > 0.
        backend: "auto", "native", "triton" or "reference".

    Shape:
        features (N, views, ...), labels (N,) any integers, or mask (N, N) of which samples are
        positives of which, with any weights >= 0; neither: a sample's other views. -> () float32.
        A mask of equal classes costs what labels cost; any other takes one more matmul of N x N. On
        CUDA the host waits for the device to find out which it is.

    Raises:
        TypeError, ValueError: a wrong argument; both labels and mask.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        validate.number("temperature", temperature, above=0.0)
        validate.number("base_temperature", base_temperature, above=0.0)
        validate.choice("contrast_mode", contrast_mode, ("all", "one"))
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.backend = backend

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        validate.is_tensor("features", features)
        if features.dim() < 3:
            raise ValueError(
                f"features must have shape (N, views, ...), got {tuple(features.shape)}"
            )
        count, views = features.shape[:2]
        columns = features.flatten(2).transpose(0, 1).flatten(0, 1)
        validate.features("features", columns)
        if labels is not None and mask is not None:
            raise ValueError("mask must be None with labels, got both" + _shown(mask))
        if mask is None:
            labels = self._labels(labels, count, columns)
        else:
            mask = _checked(mask, count, columns)
            labels = _classes(mask)
        rows = columns if self.contrast_mode == "all" else columns[:count]
        if labels is None:
            assert mask is not None
            per_anchor = self._masked(rows, columns, mask, views)
        else:
            per_anchor = self._labeled(rows, columns, labels, views)
        return self.temperature / self.base_temperature * per_anchor.mean()

    def _labels(self, labels: Tensor | None, count: int, like: Tensor) -> Tensor:
        if labels is None:
            return torch.arange(count, device=like.device)
        labels = validate.is_tensor("labels", labels).reshape(-1).to(like.device)
        if len(labels) != count:
            raise ValueError(f"labels must have {count} elements, got {len(labels)}")
        return labels.to(torch.int64)

    def _labeled(self, rows: Tensor, columns: Tensor, labels: Tensor, views: int) -> Tensor:
        everyone = labels.repeat(views)
        own = everyone[: len(rows)]
        matching = match(own, everyone, holds_itself=True)
        loss = pairs.SupConLoss(self.temperature, backend=self.backend)
        others = None if len(rows) == len(columns) else columns
        per_anchor = loss.per_anchor(rows, others, matching, 0)
        # A lone positive without another sample is certain.
        certain = matching.positives + matching.negatives <= 1
        return torch.where((matching.positives == 0) | certain, 0.0, per_anchor)

    def _masked(self, rows: Tensor, columns: Tensor, mask: Tensor, views: int) -> Tensor:
        """Any mask: the log-sum-exp over all others, less the weighted mean of logits."""
        labels = torch.arange(len(columns), device=columns.device)
        given = {"memory": columns, "memory_labels": labels, "batch_offset": 0}
        log_sums = functional.fused_pair_logsumexp(
            rows,
            labels[: len(rows)],
            **({} if len(rows) == len(columns) else given),  # type: ignore[arg-type]
            scale=1.0 / self.temperature,
            reduction="none",
            backend=self.backend,
        )
        unit = normalize_rows(columns.to(log_sums.dtype))
        mask = mask.to(log_sums.dtype)
        count = len(mask)
        with torch.autocast(unit.device.type, enabled=False):
            of_samples = mask @ unit.view(views, count, -1).sum(dim=0)
        anchors = len(rows) // count
        own, itself = unit[: len(rows)], mask.diagonal().repeat(anchors)
        sums = of_samples.repeat(anchors, 1) - itself[:, None] * own
        weight = views * mask.sum(dim=1).repeat(anchors) - itself
        mean = (own * sums).sum(dim=1) / torch.where(weight > 0, weight, 1.0)
        return torch.where(weight > 0, log_sums - mean / self.temperature, 0.0)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}, backend={self.backend!r}"
        )


def _shown(mask: Tensor) -> str:
    return f", a mask of shape {tuple(mask.shape)}"


def _checked(mask: Tensor, count: int, like: Tensor) -> Tensor:
    mask = validate.is_tensor("mask", mask).to(like.device)
    if tuple(mask.shape) != (count, count):
        raise ValueError(f"mask must have shape ({count}, {count}), got {tuple(mask.shape)}")
    return mask


def _classes(mask: Tensor) -> Tensor | None:
    """(N,) labels of which equal ones have the mask 1, others 0; None: there are none."""
    # The first sample of a sample's class.
    first = (mask != 0).to(torch.uint8).argmax(dim=1) if len(mask) else mask.new_zeros(0).long()
    same = first[:, None] == first
    return first if bool((mask == same.to(mask.dtype)).all()) else None
