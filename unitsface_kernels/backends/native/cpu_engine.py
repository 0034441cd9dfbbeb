"""Tiles on the CPU: GEMMs, and the extension's vectorized epilogues on them.

GEMMs are the extension's own where it has any for the processor. With bfloat16 operands no operator
of Torch multiplies into a float32 result. In float32 the library is about as fast on a processor of
its own, but its threads spin after each call and wait for each other: beside other work on the
machine a step takes several times as long. ``UNITSFACE_CPU_GEMM=library`` uses them all the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...deprecated import warn_of_old_name
from ..streaming import Call
from ..streaming.centers import Largest
from .arguments import address, strided_address
from .engine import DTYPE_CODES, NativeEngine

# Cosines of 4 and 1.5 MB stay in the last-level cache with their operands. Of the shapes that
# `python -m bench.tile_sizes` compares these lose least to the bare GEMMs, by 5 to 10 %.
PAIR_BLOCK = 1024
CLASS_BLOCK = (512, 768)
INT32_MAX = 2**31 - 1


@functools.cache
def _wanted_gemm() -> str | None:
    former = os.environ.get("UNITSFACE_CPU_PRODUCTS")
    if former is not None:
        warn_of_old_name("UNITSFACE_CPU_PRODUCTS", "UNITSFACE_CPU_GEMM")
    return os.environ.get("UNITSFACE_CPU_GEMM", former)


class CpuEngine(NativeEngine):
    """Rows are widened to float32 tile by tile and, for GEMMs in bfloat16, rounded as units.

    float16 is computed in float32.
    """

    sum_block = (PAIR_BLOCK, PAIR_BLOCK)
    stat_dtype = torch.float64
    keeps_cosines = True
    arguments_prefix = "Cpu"

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        super().__init__(call, device)
        self.threads = torch.get_num_threads()
        has_gemm = self.native.cpu.has_gemm
        in_bf16 = call is not None and call.compute_dtype == torch.bfloat16
        if in_bf16 and has_gemm(DTYPE_CODES[torch.bfloat16]):
            self.operand_dtype = torch.bfloat16
        largest = None if call is None or call.label_range is None else call.label_range[1]
        self.narrow_labels = largest is not None and largest <= INT32_MAX
        wanted = _wanted_gemm()
        self.library_gemm = wanted == "library" or not has_gemm(DTYPE_CODES[torch.float32])

    @property
    def class_block(self) -> tuple[int, int]:
        return self.columns_per_tile(CLASS_BLOCK)

    def _kernel(self, name: str, *arguments: Any, workspace: Sequence[int] | None = None) -> None:
        threads = () if name == "positive_rows" else (self.threads,)
        getattr(self.native.cpu, name)(*arguments, *threads)

    def cosines(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self._workspace("cosines", a.shape[0], b.shape[0])
        return self._mm(a, b.T, out)

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if self._by_library(left):
            return torch.mm(left, right, out=out)
        self._own_gemm(left, right, out, add=False)
        return out

    def _by_library(self, left: Tensor) -> bool:
        return self.library_gemm and left.dtype == torch.float32

    def _own_gemm(self, left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        (n, depth), m = left.shape, right.shape[1]
        dtype = DTYPE_CODES[left.dtype]
        packed = self._workspace("packed", self.native.cpu.gemm_workspace(dtype, n, m, depth))
        self._kernel(
            "gemm",
            self.native.Gemm(
                a=strided_address(left),
                b=strided_address(right),
                dtype=dtype,
                n=n,
                m=m,
                depth=depth,
                a_row=left.stride(0),
                a_depth=left.stride(1),
                b_row=right.stride(1),
                b_depth=right.stride(0),
                out=strided_address(out),
                stride=out.stride(0),
                add=add,
                workspace=address(packed),
            ),
        )

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Identities as int32, which fill a vector register twice as densely as int64."""
        if column_labels is None:
            return self._class_labels(row_labels, torch.int32)
        both = [row_labels] if column_labels is row_labels else [row_labels, column_labels]
        if not self.narrow_labels and any(len(t) and int(t.max()) > INT32_MAX for t in both):
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

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if self._by_library(left):
            total.addmm_(left, right)
        else:
            self._own_gemm(left, right, total, add=True)

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        # Not by operators of Torch, whose threads would spin beside the next tile's.
        n, m = tile.shape
        sums = tile.new_empty(n if dim == 1 else m, dtype=torch.float32)
        arguments = self.native.AbsoluteSums(
            tile=address(tile),
            dtype=DTYPE_CODES[tile.dtype],
            n=n,
            m=m,
            by_column=dim == 0,
            sums=address(sums),
        )
        self._kernel("absolute_sums", arguments)
        return sums

    def _take_largest(self, products: Tensor, out: Largest) -> None:
        n, m = out.cosine.shape
        arguments = self.native.LargestOfCenters(
            products=address(products),
            n=n,
            m=m,
            k=self.centers,
            cosines=address(out.cosine),
            which=address(out.which),
        )
        self._kernel("largest_of_centers", arguments)

    def _spread(self, gradient: Tensor, which: Tensor, out: Tensor) -> None:
        n, m = gradient.shape
        arguments = self.native.SpreadOverCenters(
            gradient=address(gradient),
            dtype=DTYPE_CODES[gradient.dtype],
            which=address(which),
            n=n,
            m=m,
            k=self.centers,
            out=address(out),
        )
        self._kernel("spread_over_centers", arguments)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return self._mm(left, right, self._workspace("d_unit", left.shape[0], right.shape[1]))
