"""Tiles on the CPU: products, and the extension's vectorised epilogues on them.

Products are ``torch.mm`` in float32, or the extension's own with bfloat16 operands: no operator of
Torch multiplies those into a float32 result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..streaming import Call
from .engine import NativeEngine

# Product tiles of 4 and 2 MB stay in the last-level cache with their operands. Of the shapes that
# `python -m bench.tile_sizes` compares these lose least to the bare products, by 5 to 10 %.
PAIR_BLOCK = 1024
CLASS_BLOCK = (512, 1024)
INT32_MAX = 2**31 - 1


class CpuEngine(NativeEngine):
    """Rows are widened to float32 tile by tile and, for products in bfloat16, rounded as units.

    float16 is computed in float32.
    """

    sum_block = (PAIR_BLOCK, PAIR_BLOCK)
    class_block = CLASS_BLOCK
    stat_dtype = torch.float64
    keeps_cosines = True
    arguments_prefix = "Cpu"

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        super().__init__(call, device)
        self.threads = torch.get_num_threads()
        in_bf16 = call is not None and call.compute_dtype == torch.bfloat16
        if in_bf16 and self.native.cpu.has_bf16_product():
            self.operand_dtype = torch.bfloat16

    def _kernel(self, name: str, *arguments: Any, scratch: tuple[int, int] | None = None) -> None:
        threads = () if name == "positive_rows" else (self.threads,)
        getattr(self.native.cpu, name)(*arguments, *threads)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self._buffer("product", a.shape[0], b.shape[0])
        return self._mm(a, b.T, out)

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if left.dtype == torch.float32:
            return torch.mm(left, right, out=out)
        self._bf16_product(left, right, out, add=False)
        return out

    def _bf16_product(self, left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        (n, depth), m = left.shape, right.shape[1]
        scratch = self._buffer(
            "packed", self.native.cpu.bf16_product_scratch(n, m, depth), dtype=torch.bfloat16
        )
        self._kernel(
            "bf16_product",
            self.native.Bf16Product(
                a=left.data_ptr(),
                b=right.data_ptr(),
                n=n,
                m=m,
                depth=depth,
                a_row=left.stride(0),
                a_depth=left.stride(1),
                b_row=right.stride(1),
                b_depth=right.stride(0),
                out=out.data_ptr(),
                stride=out.stride(0),
                add=add,
                scratch=scratch.data_ptr(),
            ),
        )

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Identities as int32, which fill a vector register twice as densely as int64."""
        if column_labels is None:
            return self._class_labels(row_labels, torch.int32)
        both = [row_labels] if column_labels is row_labels else [row_labels, column_labels]
        if any(len(t) and int(t.max()) > INT32_MAX for t in both):
            joined = torch.cat(both)
            dense = torch.unique(joined, return_inverse=True)[1].where(joined >= 0, -1)
            both = list(dense.split([len(t) for t in both]))
        narrow = [t.to(torch.int32) for t in both]
        return narrow[0], narrow[-1]

    def _readable(
        self, source: Tensor, start: int, count: int, index: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        source, start, index = super()._readable(source, start, count, index)
        if source.dtype == torch.float32:
            return source, start, index
        rows = source[start : start + count] if index is None else source[index]
        return rows.to(torch.float32), 0, None

    def _writable(self, out: Tensor, fallback: Tensor) -> Tensor:
        return out if out.dtype == torch.float32 else fallback

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == torch.float32:
            total.addmm_(left, right)
        else:
            self._bf16_product(left, right, total, add=True)

    def overwrite(self, left: Tensor, right: Tensor) -> Tensor:
        return self._mm(left, right, self._buffer("d_unit", left.shape[0], right.shape[1]))
