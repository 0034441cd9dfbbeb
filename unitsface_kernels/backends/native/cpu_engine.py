"""Tiles on the CPU: ``torch.mm`` for products, the extension's vectorised epilogues in place."""

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
    """Products are float32 whatever the inputs: half-precision rows are widened tile by tile."""

    sum_block = (PAIR_BLOCK, PAIR_BLOCK)
    class_block = CLASS_BLOCK
    stat_dtype = torch.float64
    keeps_cosines = True
    arguments_prefix = "Cpu"

    def __init__(self, call: Call | None, device: torch.device | None = None) -> None:
        super().__init__(call, device)
        self.threads = torch.get_num_threads()

    def _kernel(self, name: str, *arguments: Any, scratch: tuple[int, int] | None = None) -> None:
        threads = () if name == "positive_rows" else (self.threads,)
        getattr(self.native.cpu, name)(*arguments, *threads)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self._buffer("product", a.shape[0], b.shape[0])
        return torch.mm(a, b.T, out=out)

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
        total.addmm_(left, right)

    def overwrite(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out=self._buffer("d_unit", left.shape[0], right.shape[1]))
