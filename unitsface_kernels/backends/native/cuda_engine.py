"""Tiles on CUDA: cuBLAS GEMMs into an L2-sized workspace, the extension's epilogues on it.

Everything is enqueued on the current stream of the rows' device; nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory import DeviceMemory, device_memory
from ..streaming import Call
from .engine import NativeEngine

# Cosines are written and read, gradients written and read twice: 14 bytes per pair with 16-bit
# operands, 3.3 ps at the 4.3 TB/s of an H200, whose three GEMMs at D = 512 take 3.9 ps. So a tile
# has to stay in L2: with 40, 50, 60 and 126 MB (A100, H100, H200, B200) it has 2432, 2688, 3072 and
# 4352 rows of a batch. Below 2048 launches dominate, and a smaller L2 does without. Not measured.
L2_SHARE = 0.9
LEAST_ROWS = 2048
BLOCK_MULTIPLE = 128
FLOAT16_LARGEST = 2.0**15


class CudaEngine(NativeEngine):
    """Operands in the compute dtype; cosines and gradients accumulate in float32."""

    stat_dtype = torch.float32
    arguments_prefix = "Cuda"

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        super().__init__(call, device)
        memory = device_memory(self.device) or DeviceMemory.common(90)
        # Cosines are float32; gradients of that dtype take their place.
        size = 4 if call is None or call.compute_dtype == torch.float32 else 6
        self._pairs_in_l2 = max(int(L2_SHARE * memory.l2_bytes) // size, LEAST_ROWS**2)
        self._rows = LEAST_ROWS if call is None else min(call.rows.shape[0], LEAST_ROWS)
        if call is None:
            return
        self.operand_dtype = call.compute_dtype
        # A nearest loss has no gradient tiles.
        if call.compute_dtype == torch.float16 and call.spec.reduction != "nearest":
            self.gradient_scale = _float16_scale(call)

    @property
    def sum_block(self) -> tuple[int, int]:
        side = _whole_blocks(math.isqrt(self._pairs_in_l2))
        return side, side

    @property
    def class_block(self) -> tuple[int, int]:
        columns = _whole_blocks(self._pairs_in_l2 // max(self._rows, BLOCK_MULTIPLE))
        return self.columns_per_tile((LEAST_ROWS, columns))

    def _kernel(self, name: str, *arguments: Any, workspace: Sequence[int] | None = None) -> None:
        cuda = self.native.cuda
        extra: tuple[object, ...] = ()
        if workspace is not None:
            floats = getattr(cuda, name + "_workspace")(*workspace)
            extra = (self._workspace("partial sums", floats),)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(cuda, name)(*arguments, *extra, stream)

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if column_labels is None:
            return self._class_labels(row_labels, torch.int64)
        return row_labels, column_labels

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if left.dtype == torch.float32:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=torch.float32, out=out)

    def cosines(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self._workspace("cosines", a.shape[0], b.shape[0])
        return self._mm(a, b.T, out)

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == torch.float32:
            total.addmm_(left, right)
        else:
            total.add_(
                self._mm(left, right, self._workspace("partial", *total.shape)),
                alpha=1.0 / self.gradient_scale,
            )

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        result = self._mm(left, right, self._workspace("d_unit", left.shape[0], right.shape[1]))
        return result if self.gradient_scale == 1.0 else result.div_(self.gradient_scale)


def _whole_blocks(size: int) -> int:
    return size // BLOCK_MULTIPLE * BLOCK_MULTIPLE


def _float16_scale(call: Call) -> float:
    """The power of two that brings the largest gradient of a tile just below overflow.

    A pair counts in two directions at most, with weights that the drivers keep at most 1. For a
    softmax at s = 64 this is 2^8: probabilities down to 1e-11 are not rounded to 0.
    """
    largest = 2.0 * call.spec.slope_bound(call.params)
    return 2.0 ** math.floor(math.log2(FLOAT16_LARGEST / largest))
