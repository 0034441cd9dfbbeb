"""One call of a fused operator, as the drivers receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...losses import LossSpec


@dataclass(frozen=True)
class Call:
    """Validated arguments; every tensor is contiguous and on one device.

    Attributes:
        rows: (N, D) features.
        row_labels: (N,) int64. Pair topology: identity, -1 ignored. Class topology: position of
            the target among the columns, -1 ignored, -2 no target in this shard.
        columns: (M, D) memory or class weights; None: the batch itself, pair (i, i) excluded.
        column_labels: (M,) int64 identities, -1 neither positive nor negative; None for classes.
        column_index: (K,) int64 rows of ``columns`` that take part; None: all.
        threshold: (1,) or, for ``spec.threshold == "per_column"``, one per identity or column.
        reduction: "mean", "sum" or "none".
        compute_dtype: operands of the matrix products; they accumulate in float32.
    """

    spec: LossSpec
    params: tuple[float, ...]
    rows: Tensor
    row_labels: Tensor
    columns: Tensor | None
    column_labels: Tensor | None
    column_index: Tensor | None
    threshold: Tensor | None
    reduction: str
    compute_dtype: torch.dtype
    need_rows: bool
    need_columns: bool
    need_threshold: bool

    @property
    def num_columns(self) -> int:
        if self.column_index is not None:
            return self.column_index.shape[0]
        return (self.rows if self.columns is None else self.columns).shape[0]

    @property
    def need_any(self) -> bool:
        return self.need_rows or self.need_columns or self.need_threshold

    def counted(self) -> Tensor:
        """Number of rows that are not ignored, at least 1; () float32, no host sync."""
        return (self.row_labels != -1).sum().clamp(min=1).to(torch.float32)


def split_weights(call: Call, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """(N,) upstream gradients as factors of at most 1 and a common scale (), or unchanged.

    Gradient tiles in float16 would overflow under loss scaling; the scale is applied in float32
    when the rows' gradients are finished.
    """
    if call.compute_dtype != torch.float16 or weights.numel() == 0:
        return weights, None
    scale = weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return weights / scale, scale


@dataclass
class Result:
    """What a forward pass returns; gradients are float32, for an upstream gradient of one.

    Attributes:
        loss: () or, with ``reduction="none"``, (N,) float32.
        state: what the backward pass needs of it; (2, N) for logsumexp, None for sum.
        gradients: of the rows (N, D), the columns (M or K, D) and the threshold; None where not
            needed or not known yet.
    """

    loss: Tensor
    state: Tensor | None
    gradients: Gradients


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
