"""State shared by the tiles of one call: configuration, reused memory and float16 scaling."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..memory import device_memory
from ..streaming import Call
from . import configs, launch
from .losses import (
    LogsumexpPairsPolicy,
    LogsumexpPolicy,
    SumPolicy,
    SumTermsPolicy,
    policy_of,
)

#: Unit rows are zero-padded to a multiple of this, which every block_k divides.
DEPTH_MULTIPLE = 64
#: Leading dimension of gradient tiles: full-width stores, and rows aligned for the library.
STRIDE_MULTIPLE = 64
#: Columns of a tile at most.
LARGEST_BLOCK = 256


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int, int, int, int, int]:
    """Unit rows and unit columns as tile kernels take them, with strides, sizes and depth.

    Kernels read the padding behind every row: it takes rows as ``Engine.normalize_rows`` made them.
    Of columns without numbers ``a`` has the cosines, see ``centers_tile.py``.
    """
    if not b.shape[1]:
        return a, a, a.stride(0), 0, a.shape[0], b.shape[0], 0
    (rows, width), columns = a.shape, b.shape[0]
    (a_stride, a_step), (b_stride, b_step) = a.stride(), b.stride()
    depth = padded(width, DEPTH_MULTIPLE)
    assert a_step == b_step == 1
    assert min(a_stride, b_stride) >= depth
    if depth > width:
        assert _end(a, depth) <= _held(a)
        assert _end(b, depth) <= _held(b)
    return a, b, a_stride, b_stride, rows, columns, depth


def _end(rows: Tensor, depth: int) -> int:
    """The first element of their memory behind ``depth`` elements of the last one."""
    return int(rows.storage_offset()) + (len(rows) - 1) * rows.stride(0) + depth


def _held(rows: Tensor) -> int:
    return rows.untyped_storage().nbytes() // rows.element_size()


def uses_tf32() -> bool:
    """Whether the user lets float32 GEMMs run in TF32."""
    matmul = torch.backends.cuda.matmul
    # Reading the older flag raises once the newer one was set.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def shipped_config(call: Call, capability: int | None = None) -> configs.Config:
    """The configuration of ``configs.py`` for a call; ``capability`` None: of its device."""
    tf32 = call.compute_dtype == torch.float32 and uses_tf32()
    device = call.rows.device
    if capability is None:
        if device.index is not None:
            return device_config(device, call.compute_dtype, tf32)
        capability = launch.capability(device)
    return configs.select(capability, call.compute_dtype, tf32, device_memory(device))


@cache
def device_config(device: torch.device, dtype: torch.dtype, tf32: bool) -> configs.Config:
    """The same of a device with an index, looked up once."""
    return configs.select(launch.capability(device), dtype, tf32, device_memory(device))


class Workspace:
    """Memory that every tile of a call reuses, so that they stay in the L2 cache.

    Attributes:
        params: see :meth:`LossSpec.kernel_params`.
        precision: of float32 GEMMs, as ``tl.dot`` names it.
        scale, inverse_scale: float16 only, (1,): factor of the current gradient tile and its
            inverse; else None.
        scales: those of ``scaling.set_scale``.
    """

    def __init__(self, call: Call, config: configs.Config) -> None:
        self.call = call
        tf32 = call.compute_dtype == torch.float32 and uses_tf32()
        self.precision = "tf32" if tf32 else "ieee"
        self.config = config
        self.scale: Tensor | None = None
        self.inverse_scale: Tensor | None = None
        # The formula of a nearest loss is eager.
        self._policy = None if call.spec.triplet is not None else policy_of(call.spec)
        self.params = call.kernel_params
        self._held: dict[str, Tensor] = {}
        # Most tiles have the shape of the one before: each view is made once.
        self._views: dict[tuple[str, int, int, int], Tensor] = {}
        self.scales: dict[tuple[object, ...], tuple[Tensor, list[Tensor]]] = {}

    @property
    def sum_policy(self) -> SumPolicy | SumTermsPolicy:
        assert isinstance(self._policy, SumPolicy | SumTermsPolicy)
        return self._policy

    @property
    def terms_policy(self) -> SumTermsPolicy:
        assert isinstance(self._policy, SumTermsPolicy)
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
            # In TF32 the gradient kernel has no registers left for the factors.
            and self.precision == "ieee"
            and columns.shape[1] % DEPTH_MULTIPLE == 0
            # Else every load of the kernels, and the library's, would be narrower.
            and columns.storage_offset() * columns.element_size() % 16 == 0
        )

    def factors(self, count: int) -> Tensor:
        """(count,) in memory that goes on to the end of the last tile, see ``column_factors``."""
        return self.empty(count + LARGEST_BLOCK)[:count]

    def empty(self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.rows.device)

    def unit_tile(self, count: int, width: int, reuse: bool) -> tuple[Tensor, Tensor]:
        """(count, width) in the dtype of the GEMMs with padded rows, and (count,) float32.

        With ``reuse`` always the same memory.
        """
        shape = (count, padded(width, DEPTH_MULTIPLE))
        if not reuse:
            unit = self.empty(shape, self.call.compute_dtype)
            return (unit if shape[1] == width else unit[:, :width]), self.empty(count)
        columns = self._kept("columns", shape, width, self.call.compute_dtype)
        return columns, self._kept("norms", (1, count), count, torch.float32)[0]

    def gradient_tile(self, count: int, width: int, name: str = "gradient") -> Tensor:
        """(count, width) with padded rows, always the same memory for a name."""
        shape = (count, padded(width, STRIDE_MULTIPLE))
        return self._kept(name, shape, width, self.call.compute_dtype)

    def largest_tile(self, count: int, width: int) -> tuple[Tensor, Tensor]:
        """(count, width) float32 and uint8 with padded rows, always the same memory."""
        shape = (count, padded(width, STRIDE_MULTIPLE))
        cosines = self._kept("largest", shape, width, torch.float32)
        return cosines, self._kept("which", shape, width, torch.uint8)

    def partial_sums(self, blocks: int, count: int) -> tuple[Tensor, Tensor]:
        """Two (blocks, count) float32, always the same memory."""
        shape = (blocks, count)
        maximum = self._kept("partial maxima", shape, count, torch.float32)
        return maximum, self._kept("partial totals", shape, count, torch.float32)

    def _kept(self, name: str, shape: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
        """The first ``width`` columns of (n, m) memory that each of this name overwrites."""
        key = (name, *shape, width)
        found = self._views.get(key)
        if found is None:
            size, held = shape[0] * shape[1], self._held.get(name)
            if held is None:
                held = self._held[name] = self.empty(size, dtype)
            elif held.shape[0] < size:
                held = self._held[name] = self.empty(size, dtype)
                self._views = {k: view for k, view in self._views.items() if k[0] != name}
            found = (held if held.shape[0] == size else held[:size]).view(shape)
            if width < shape[1]:
                found = found[:, :width]
            self._views[key] = found
        return found

    def partial_products(self, size: int) -> Tensor:
        """(1, size) float32, always the same memory."""
        return self._kept("partial products", (1, size), size, torch.float32)
