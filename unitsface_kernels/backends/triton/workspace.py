"""State shared by the tiles of one call: configuration, reused memory and float16 scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streaming import Call
from . import configs, launch
from .losses import POLICIES, LogsumexpPairsPolicy, LogsumexpPolicy, SumPolicy

#: Unit rows are zero-padded to a multiple of this, which every block_k divides.
DEPTH_MULTIPLE = 64
#: Leading dimension of gradient tiles: full-width stores, and rows aligned for the library.
STRIDE_MULTIPLE = 64
#: Largest float16 gradient aimed at; a quarter of the format's range is left for rounding up.
FLOAT16_TARGET = 2.0**14


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int, int, int, int, int]:
    """Unit rows and unit columns as tile kernels take them, with strides, sizes and depth.

    Kernels read the padding behind every row: it takes rows as ``Engine.normalize_rows`` made them.
    """
    depth = padded(a.shape[1], DEPTH_MULTIPLE)
    for rows in (a, b):
        end = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + depth
        held = rows.untyped_storage().nbytes() // rows.element_size()
        assert rows.stride(1) == 1
        assert rows.stride(0) >= depth
        assert end <= held
    return a, b, a.stride(0), b.stride(0), len(a), len(b), depth


def uses_tf32() -> bool:
    """Whether the user lets float32 GEMMs run in TF32."""
    matmul = torch.backends.cuda.matmul
    # Reading the older flag raises once the newer one was set.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def shipped_config(call: Call, capability: int | None = None) -> configs.Config:
    """The configuration of ``configs.py`` for a call; ``capability`` None: of its device."""
    tf32 = call.compute_dtype == torch.float32 and uses_tf32()
    found = launch.capability(call.rows.device) if capability is None else capability
    return configs.select(found, call.compute_dtype, tf32)


class Workspace:
    """Memory that every tile of a call reuses, so that they stay in the L2 cache.

    Attributes:
        precision: of float32 GEMMs, as ``tl.dot`` names it.
        scale, inverse_scale: float16 only, (1,): factor of the current gradient tile and its
            inverse; else None.
    """

    def __init__(self, call: Call, config: configs.Config) -> None:
        self.call = call
        tf32 = call.compute_dtype == torch.float32 and uses_tf32()
        self.precision = "tf32" if tf32 else "ieee"
        self.config = config
        self.scale: Tensor | None = None
        self.inverse_scale: Tensor | None = None
        # None for a nearest loss: its formula is eager.
        self._policy = POLICIES.get(call.spec.name)
        self._columns: Tensor | None = None
        self._gradient: Tensor | None = None
        self._partial: Tensor | None = None
        self._scales: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def sum_policy(self) -> SumPolicy:
        assert isinstance(self._policy, SumPolicy)
        return self._policy

    @property
    def logsumexp_policy(self) -> LogsumexpPolicy:
        assert isinstance(self._policy, LogsumexpPolicy)
        return self._policy

    @property
    def pairs_policy(self) -> LogsumexpPairsPolicy:
        assert isinstance(self._policy, LogsumexpPairsPolicy)
        return self._policy

    def multiplies(self, columns: Tensor) -> bool:
        """Whether tiles can multiply the (M, D) columns of the call as they are.

        They are dense. Not in float16: products with rows that are not at unit length could leave
        its range. In bfloat16 a gradient times the inverse of a norm above 1e33 is denormal.
        """
        return (
            columns.dtype == self.call.compute_dtype != torch.float16
            and columns.shape[1] % DEPTH_MULTIPLE == 0
            # Else every load of the kernels, and the library's, would be narrower.
            and columns.storage_offset() * columns.element_size() % 16 == 0
        )

    def empty(self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.rows.device)

    def unit_tile(self, count: int, stride: int, reuse: bool) -> Tensor:
        """(count, stride) in the dtype of the GEMMs; with ``reuse`` always the same memory."""
        size = count * stride
        if not reuse:
            return self.empty((count, stride), self.call.compute_dtype)
        if self._columns is None or self._columns.numel() < size:
            self._columns = self.empty(size, self.call.compute_dtype)
        return self._columns[:size].view(count, stride)

    def gradient_tile(self, count: int, width: int) -> Tensor:
        """(count, width) with padded rows, always the same memory."""
        stride = padded(width, STRIDE_MULTIPLE)
        size = count * stride
        if self._gradient is None or self._gradient.numel() < size:
            self._gradient = self.empty(size, self.call.compute_dtype)
        return self._gradient[:size].view(count, stride)[:, :width]

    def partial_products(self, size: int) -> Tensor:
        """(size,) float32, always the same memory."""
        if self._partial is None or self._partial.numel() < size:
            self._partial = self.empty(size)
        return self._partial

    def set_scale(self, bound: float, target_gradient: Tensor | None = None) -> None:
        """Picks the power of two that brings float16 gradients to the top of the format's range.

        ``bound`` holds for pairs whose weights are at most 1, as they are in float16 calls;
        targets' gradients, with the slope of a margin in them, may be larger. Without a factor
        the many tiny gradients of a softmax would be flushed to zero. It stays on the device.
        """
        if self.call.compute_dtype != torch.float16:
            return
        # One per block of rows: the same block comes with every wave of columns.
        key = 0 if target_gradient is None else target_gradient.data_ptr()
        if key not in self._scales:
            limit = self.empty(1).fill_(bound)
            if target_gradient is not None:
                limit = torch.maximum(limit, target_gradient.abs().amax())
            exponent = torch.floor(torch.log2(FLOAT16_TARGET / limit))
            # NaN gradients stay NaN by themselves.
            exponent = torch.nan_to_num(exponent, nan=0.0).clamp(-100.0, 100.0)
            self._scales[key] = torch.exp2(exponent), torch.exp2(-exponent)
        self.scale, self.inverse_scale = self._scales[key]
