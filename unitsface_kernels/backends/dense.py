"""Memory layout that kernels require of a tensor, and zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the values lie one after the other, as they are, in aligned memory.

    Not so are strides, a pending negation (of an imaginary part), and memory that Torch did not
    allocate, such as a file's read from its middle.
    """
    return (
        tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.itemsize == 0
    )


def dense(tensor: Tensor) -> Tensor:
    """The tensor without its graph; a copy only if it is not dense."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    # As ``is_dense``, without its frame.
    if tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.itemsize == 0:
        return tensor
    tensor = tensor.resolve_neg().contiguous()
    return tensor if is_dense(tensor) else tensor.clone()


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """:meth:`torch.Tensor.to`, which takes a microsecond to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# Torch fills a tensor of fewer elements on the calling thread.
_FILLED_ALONE = 32767


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Float32 zeros on the device of ``like``; on the CPU without Torch's threads.

    These would spin on for milliseconds, on the cores that the kernels are about to use.
    """
    if like.device.type != "cpu" or math.prod(shape) <= _FILLED_ALONE:
        return like.new_zeros(shape, dtype=torch.float32)
    out = like.new_empty(shape, dtype=torch.float32)
    for part in out.view(-1).split(_FILLED_ALONE):
        part.zero_()
    return out
