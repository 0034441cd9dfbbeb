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
from .engine import DTYPE_CODES, NativeEngine

# Cosines of 4 and 1.5 MB stay in the last-level cache with their operands. Of the shapes that
# `python -m bench.tile_sizes` compares these lose least to the bare GEMMs, by 5 to 10 %.
PAIR_BLOCK = 1024
CLASS_BLOCK = (512, 768)
INT32_MAX = 2**31 - 1

#: ``left``, ``right``, ``out``, and whether the product is added to ``out``.
Product = tuple[Tensor, Tensor, Tensor, bool]


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
    row_dtypes = frozenset({torch.float32})

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
        self._multiply((a, b.T, out, False))
        return out

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        self._multiply((left, right, total, True))

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        out = self._workspace("d_unit", left.shape[0], right.shape[1])
        self._multiply((left, right, out, False))
        return out

    def both_products(
        self, tile: Tensor, a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor | None
    ) -> Tensor:
        add = d_b is not None
        if d_b is None:
            d_b = self._workspace("d_unit", *b.shape)
        self._multiply((tile, b, d_a, True), (tile.T, a, d_b, add))
        return d_b

    def _multiply(self, *products: Product) -> None:
        dtype = products[0][0].dtype
        if not self.library_gemm or dtype != torch.float32:
            # All at once: their loops over threads have one start and one end.
            self.native.cpu.gemm(DTYPE_CODES[dtype], products, self.threads)
            return
        for left, right, out, add in products:
            if add:
                out.addmm_(left, right)
            else:
                torch.mm(left, right, out=out)

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

    def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
        # Not by operators of Torch, whose threads would spin beside the next tile's.
        n, m = tile.shape
        sums = tile.new_empty(n if dim == 1 else m, dtype=torch.float32)
        arguments = self.native.AbsoluteSums(
            tile=tile,
            dtype=DTYPE_CODES[tile.dtype],
            n=n,
            m=m,
            by_column=dim == 0,
            sums=sums,
        )
        self._kernel("absolute_sums", arguments)
        return sums

    def _take_largest(self, products: Tensor, out: Largest) -> None:
        n, m = out.cosine.shape
        arguments = self.native.LargestOfCenters(
            products=products,
            n=n,
            m=m,
            k=self.centers,
            cosines=out.cosine,
            which=out.which,
        )
        self._kernel("largest_of_centers", arguments)

    def _spread(self, gradient: Tensor, which: Tensor, out: Tensor) -> None:
        n, m = gradient.shape
        arguments = self.native.SpreadOverCenters(
            gradient=gradient,
            dtype=DTYPE_CODES[gradient.dtype],
            which=which,
            n=n,
            m=m,
            k=self.centers,
            out=out,
        )
        self._kernel("spread_over_centers", arguments)
