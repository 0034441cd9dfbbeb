"""Library GEMMs of gradient tiles with unit rows, accumulated in float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor, factor: Tensor | None) -> Tensor:
    """(n, k) @ (k, m) in float32, times ``factor`` (1,) if given."""
    if left.dtype == torch.float32:
        result = torch.mm(left, right)
    elif left.is_cuda:
        result = torch.mm(left, right, out_dtype=torch.float32)
    else:
        # Only CUDA multiplies 16-bit factors into float32.
        result = torch.mm(left.float(), right.float())
    return result if factor is None else result.mul_(factor)


def addmm(total: Tensor, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
    """``total += factor * (left @ right)``; ``total`` is (n, m) float32."""
    if factor is not None:
        total.addcmul_(matmul(left, right, None), factor)
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        _addmm_mixed(total, left, right)
    else:
        total.addmm_(left.float(), right.float())


def _addmm_mixed(total: Tensor, left: Tensor, right: Tensor) -> None:
    if _mixes(left.dtype, left.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))


@cache
def _mixes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.addmm takes a float32 sum beside 16-bit factors; older Torch raises.

    Tried on a GEMM of its own, so that an error of a real one, such as a lack of memory,
    is never taken for a missing operation. Any other error is raised and nothing is cached.
    """
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        # Subclasses are failures of the device: torch.OutOfMemoryError, torch.AcceleratorError.
        if type(error) in (RuntimeError, TypeError) and "dtype" in str(error):
            return False
        raise
    return True
