"""What a fake device records: the work that a real one would have been given, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Array:
    """A tensor of the device: where it lies and how.

    Attributes:
        storage: number of the allocation, from 1; no number is used twice.
        offset: of the first element in the allocation, in elements.
        address: of the first element, in bytes; allocations are aligned to 512 bytes.
    """

    storage: int
    offset: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps; an expanded dimension counts once."""
        count = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride or size == 0 else 1
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Gemm:
    """``batch`` products of (m, k) and (k, n), summed in ``out``'s dtype as the library gets them.

    Attributes:
        accumulates: whether the result is added to what is there.
        left, right, out: operands.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    accumulates: bool
    left: Array
    right: Array
    out: Array
    batch: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k


#: Kinds of :class:`Work`. Views and allocations are none; "wait" stops the host.
KINDS = (
    "triton",
    "native",
    "gemm",
    "copy",
    "fill",
    "elementwise",
    "reduction",
    "index",
    "sort",
    "collective",
    "wait",
    "event",
)


@dataclass(frozen=True)
class Work:
    """One request of the host to the device.

    Attributes:
        order: from 0.
        kind: one of ``KINDS``.
        name: of the kernel or of the operator ("aten.mm.dtype_out").
        stream: handle of the stream that it went to.
        reads, writes: tensors; for kernels, whose arguments do not show which, ``reads`` has all.
        bytes: that it moves at least, every element once for each time it is read or written.
        launches: device kernels, approximate for library operators that choose them at run time
            (sorts count as 4, everything else as 1).
        programs: of a Triton kernel, else 0.
        gemm: of kind "gemm".
        arguments: by parameter name; tensors as :class:`Array`.
        options: of the launch: constants, warps, stages.
        call: what was called, with ``arguments`` for a replay: a Triton kernel, an operator, or
            the name of a native kernel.
        section: name of the part of the step, see :meth:`Tape.section`.
        live_bytes: allocated on the device afterwards.
    """

    order: int
    kind: str
    name: str
    stream: int
    reads: tuple[Array, ...] = ()
    writes: tuple[Array, ...] = ()
    bytes: int = 0
    launches: int = 1
    programs: int = 0
    gemm: Gemm | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    call: Any = None
    section: str = ""
    live_bytes: int = 0


@dataclass
class Tape:
    """Everything that was recorded.

    Attributes:
        work: in the order of the host.
        start_bytes, peak_bytes: allocated on the device at the start, gradients of an earlier step
            included, and at most; sizes are rounded up to 512 bytes, as Torch's allocator counts
            them. Memory that operators take and free inside is not in it (sorts), nor is the
            library's workspace.
        largest_bytes: of the largest allocation.
        largest_shape: its shape.
        requested_bytes: sum of all allocations.
        allocations: their number.
    """

    work: list[Work] = field(default_factory=list)
    start_bytes: int = 0
    peak_bytes: int = 0
    largest_bytes: int = 0
    largest_shape: tuple[int, ...] = ()
    requested_bytes: int = 0
    allocations: int = 0

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work)

    @property
    def extra_bytes(self) -> int:
        """The peak above what was there at the start."""
        return self.peak_bytes - self.start_bytes

    def of(self, *kinds: str) -> list[Work]:
        return [work for work in self.work if work.kind in kinds]

    def gemms(self) -> Iterator[tuple[Work, Gemm]]:
        for work in self.work:
            if work.gemm is not None:
                yield work, work.gemm

    def counts(self) -> Counter[str]:
        """Launches by kernel or operator."""
        found: Counter[str] = Counter()
        for work in self.work:
            found[work.name] += work.launches
        return found

    def waits(self) -> list[Work]:
        return self.of("wait")
