"""Library products of gradient tiles with unit rows, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

# Whether torch.addmm takes a float32 sum beside 16-bit factors; older Torch refuses it.
_mixed_addmm: bool | None = None


def product(left: Tensor, right: Tensor, factor: Tensor | None) -> Tensor:
    """(n, k) @ (k, m) in float32, times ``factor`` (1,) if given."""
    if left.dtype == torch.float32:
        result = torch.mm(left, right)
    elif left.is_cuda:
        result = torch.mm(left, right, out_dtype=torch.float32)
    else:
        # Only CUDA multiplies 16-bit factors into float32.
        result = torch.mm(left.float(), right.float())
    return result if factor is None else result.mul_(factor)


def accumulate(total: Tensor, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
    """``total += factor * (left @ right)``; ``total`` is (n, m) float32."""
    if factor is not None:
        total.addcmul_(product(left, right, None), factor)
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        _accumulate_mixed(total, left, right)
    else:
        total.addmm_(left.float(), right.float())


def _accumulate_mixed(total: Tensor, left: Tensor, right: Tensor) -> None:
    global _mixed_addmm
    if _mixed_addmm is not False:
        try:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
            _mixed_addmm = True
            return
        except RuntimeError:
            # Refused before any work. After a first success every error is a real one.
            if _mixed_addmm:
                raise
            _mixed_addmm = False
    total.add_(torch.mm(left, right, out_dtype=torch.float32))
