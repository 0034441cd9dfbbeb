"""Memory layout that kernels require of a tensor."""

from __future__ import annotations

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the values lie one after the other, as they are, in aligned memory.

    Not so are strides, a pending negation (of an imaginary part), and memory that Torch did not
    allocate, such as a file's read from its middle.
    """
    return (
        tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.data_ptr() % tensor.element_size() == 0
    )


def dense(tensor: Tensor) -> Tensor:
    """The tensor without its graph; a copy only if it is not dense."""
    tensor = tensor.detach()
    if is_dense(tensor):
        return tensor
    tensor = tensor.resolve_neg().contiguous()
    return tensor if is_dense(tensor) else tensor.clone()
