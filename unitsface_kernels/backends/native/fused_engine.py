"""Tiles on CUDA whose kernels multiply themselves: cosines never reach memory.

Tiles that read cosines for another purpose take them from cuBLAS as :class:`CudaEngine` does:
classes of several centers, `nearest` losses, and histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..streaming import Call, ClassTile, PairTile, SumTile
from .arguments import strided_address
from .cuda_engine import CudaEngine
from .engine import DTYPE_CODES

#: Kernels with a product of their own, as ``fused_`` and this name.
FUSED = {
    *("sum_tile", "logsumexp_tile", "logsumexp_gradient_tile"),
    *("pair_negatives_tile", "pair_positives_tile", "pair_gradient_tile"),
}

#: Rows and columns of in-batch tiles: 32 tiles of 128 x 128 for each of 132 multiprocessors, and a
#: gradient of 128 MB in 16 bits.
HOPPER_BLOCK = 8192


class FusedEngine(CudaEngine):
    """Arguments of a tile as ever, with the operands of a product in the place of its cosines."""

    #: Of the tile whose kernel is launched next.
    _operands: tuple[Tensor, Tensor] | None = None
    _total = False

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        super().__init__(call, device)
        self._float32_may_round = torch.backends.cuda.matmul.allow_tf32
        on_cuda = self.device.type == "cuda"
        #: Kernels that exist for this architecture alone end with this.
        self._suffix = "_sm90" if on_cuda and _is_hopper(self.device) else ""

    @property
    def sum_block(self) -> tuple[int, int]:
        if not self._suffix:
            return super().sum_block
        # No cosines have to stay in L2, and a launch is for all multiprocessors several times.
        return HOPPER_BLOCK, HOPPER_BLOCK

    @property
    def total_slots(self) -> int:  # type: ignore[override]
        """One for every tile of 128 x 128; and arguments have room for a sum per row."""
        if self.centers != 1:
            return 0
        slots = getattr(self.native.cuda, f"{self._best('fused_sum_total')}_slots")
        blocks = self.sum_block, self.class_block
        return max(max(n, m, slots(n, m)) for n, m in blocks)

    def _cosines_of(
        self, tile: SumTile | ClassTile | PairTile, kept: Tensor | None = None
    ) -> Tensor:
        if self.centers != 1 or kept is not None:
            return super()._cosines_of(tile, kept)
        self._operands = _rows(tile.a), _rows(tile.b)
        # Shape and strides without memory; kernels of boxes take rows at multiples of 16 bytes.
        count, width = len(tile.a), len(tile.b)
        return torch.empty(count, -(-width // 8) * 8, device="meta")[:, :width]

    def _gradient_workspace(self, cosines: Tensor) -> Tensor:
        if not cosines.is_meta:
            return super()._gradient_workspace(cosines)
        count, width = cosines.shape
        padded = cosines.stride(0)
        return self._workspace("gradient", count, padded, dtype=self.operand_dtype)[:, :width]

    def _best(self, name: str) -> str:
        own = name + self._suffix
        return own if hasattr(self.native.cuda, own) else name

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        self._total = tile.total
        return super().sum_tile(tile)

    def _kernel(self, name: str, *arguments: Any, workspace: Sequence[int] | None = None) -> None:
        if self._operands is None or name not in FUSED:
            super()._kernel(name, *arguments, workspace=workspace)
            return
        loss, params, tile = arguments
        (a, b), self._operands = self._operands, None
        operands = self.native.FusedOperands(
            a=strided_address(a),
            b=strided_address(b),
            dtype=DTYPE_CODES[a.dtype],
            tf32=self._float32_may_round,
            n=a.shape[0],
            m=b.shape[0],
            depth=a.shape[1],
            a_stride=a.stride(0),
            b_stride=b.stride(0),
        )
        if name == "sum_tile" and self._total:
            name, workspace = "sum_total", None
        super()._kernel(
            self._best(f"fused_{name}"), loss, params, operands, tile, workspace=workspace
        )


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _rows(matrix: Tensor) -> Tensor:
    """Contiguous along the depth, and no row before the end of another."""
    count, size = matrix.shape
    if matrix.stride(1) == 1 and (matrix.stride(0) >= size or count < 2):
        return matrix if matrix.stride(0) >= size else matrix.reshape(count, size).contiguous()
    return matrix.contiguous()
