"""Predicted time of a recorded step: its launches one after the other on one chip."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..fake_device import Array, Gemm, Tape, Work
from .chips import Chip
from .compile import Compiled
from .compile import Gemm as TileGemm
from .tiles import tile_cost

#: Granularity at which the L2 cache is followed.
PAGE = 1 << 18


class Cache:
    """Which memory L2 holds, if it always replaces what was used longest ago.

    Torch's allocator gives a new tensor the memory of one that was freed before, so the first
    touch of a small one is no miss.
    """

    def __init__(self, chip: Chip) -> None:
        self._most = int(chip.l2_usable * chip.device.l2_bytes) // PAGE
        self._pages: OrderedDict[int, None] = OrderedDict()
        self._known: set[int] = set()

    def missed(self, array: Array) -> float:
        """Fraction of an array that memory has to deliver or to take."""
        pages = range(array.address // PAGE, (array.address + array.nbytes - 1) // PAGE + 1)
        if not len(pages) or not array.nbytes:
            return 0.0
        new = array.storage not in self._known and len(pages) <= self._most // 4
        missing = 0 if new else sum(page not in self._pages for page in pages)
        self._known.add(array.storage)
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)
        return missing / len(pages)


@dataclass
class Group:
    """Work of one purpose in a step; ``programs``: of Triton kernels."""

    count: int = 0
    programs: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    l2_bytes: float = 0.0
    hbm_bytes: float = 0.0


@dataclass
class Prediction:
    """The prediction for one step.

    Attributes:
        flops: FLOPs of its GEMMs, the library's and the kernels'.
        roofline_seconds: time of these FLOPs at the rate of a large GEMM.
        groups: work by kernel or kind of operator.
        waits: how often the host waits for the device.
        host_seconds: host time without the driver; None: not known.
    """

    step: str
    launches: int
    flops: float
    roofline_seconds: float
    peak_bytes: int
    waits: int
    groups: dict[str, Group] = field(default_factory=dict)
    host_seconds: float | None = None

    @property
    def seconds(self) -> float:
        return sum(group.seconds for group in self.groups.values())

    @property
    def roofline_fraction(self) -> float:
        return self.roofline_seconds / self.seconds


def predict(
    tape: Tape, step: str, flops: float, chip: Chip, kernel: Callable[[Work], Compiled]
) -> Prediction:
    """Args:
    flops: of the step's GEMMs.
    kernel: what a Triton launch runs.
    """
    cache = Cache(chip)
    groups: dict[str, Group] = defaultdict(Group)
    for work in tape.work:
        if not work.launches:
            continue
        group = groups[_purpose(work)]
        hbm = _memory_bytes(work, cache)
        seconds, l2_bytes = _cost(work, hbm, chip, kernel)
        group.count += work.launches
        group.programs += work.programs
        least = chip.reduction_seconds if work.kind == "reduction" else chip.kernel_seconds
        group.seconds += max(seconds, hbm / chip.copy_rate, work.launches * least)
        group.l2_bytes += l2_bytes
        group.hbm_bytes += hbm
        group.flops += work.gemm.flops if work.gemm else 0.0
    ordered = sorted(groups.items(), key=lambda item: -item[1].seconds)
    return Prediction(
        step,
        tape.launches,
        flops,
        flops / chip.gemm_rate,
        tape.extra_bytes,
        len(tape.waits()),
        dict(ordered),
    )


def _purpose(work: Work) -> str:
    if work.kind in ("triton", "native"):
        return work.name
    return {"gemm": "library GEMMs"}.get(work.kind, f"library, {work.kind}")


def _cost(
    work: Work, hbm: float, chip: Chip, kernel: Callable[[Work], Compiled]
) -> tuple[float, float]:
    """Seconds that memory does not explain, and bytes through L2."""
    if work.gemm is not None:
        gemm = work.gemm
        l2_bytes = float(gemm.left.nbytes + gemm.right.nbytes + gemm.out.nbytes)
        return gemm_seconds(gemm, chip), l2_bytes
    compiled = kernel(work) if work.kind == "triton" else None
    if compiled is None:
        return work.bytes / chip.l2_bandwidth, float(work.bytes)
    if compiled.gemm is None:
        # A few programs cannot keep enough loads in flight.
        resident = chip.programs_per_sm(compiled.registers, compiled.shared, compiled.warps)
        together = min(work.programs, resident * chip.sms)
        rate = min(chip.l2_bandwidth, together * compiled.loaded / chip.round_seconds)
        return work.bytes / rate, float(work.bytes)
    steps = _steps(work, compiled.gemm) if compiled.gemm.open else 1.0
    cost = tile_cost(compiled, chip, steps)
    # Programs end one by one: on average the last one of an SM is half done when others are idle.
    per_sm = max(work.programs / chip.sms + 0.5, 1.0) if work.programs > 1 else 1.0
    return per_sm * cost.cycles / chip.clock, work.programs * cost.l2_bytes


def _steps(work: Work, gemm: TileGemm) -> float:
    """Steps of a program where the device may leave out rows and leaves out none."""
    left, right = [array for array in work.reads if len(array.shape) == 2][:2]
    products = left.numel * right.shape[1]
    return products / (gemm.m * gemm.n * gemm.step * work.programs)


def gemm_seconds(gemm: Gemm, chip: Chip) -> float:
    """Time of a library GEMM."""
    rate = gemm_rate(gemm.m, gemm.n, gemm.k, chip, gemm.batch)
    return gemm.flops / rate * gemm.dtype.itemsize / 2


def gemm_rate(m: int, n: int, k: int, chip: Chip, batch: int = 1) -> float:
    """FLOP/s in bf16, by how its output blocks fill the SMs; a deep one is split."""
    block_m, block_n = chip.gemm_block
    blocks = -(-m // block_m) * -(-n // block_n) * batch
    parts = min(max(chip.sms // blocks, 1), max(k // chip.split_depth, 1))
    waves = -(-blocks * parts // chip.sms)
    rate = chip.gemm_rate * blocks * parts / (waves * chip.sms)
    if parts > 1:
        rate *= chip.split_efficiency
    # The rate of a large GEMM already has the last wave of a usual one.
    return min(rate, chip.gemm_rate)


def _memory_bytes(work: Work, cache: Cache) -> float:
    """Bytes between L2 and memory; of arrays of which only some rows are taken, those."""
    total = 0.0
    for array, times in _touched(work):
        part = min(1.0, work.bytes / array.nbytes) if array.nbytes else 0.0
        total += times * part * array.nbytes * cache.missed(array)
    return min(total, float(work.bytes)) if work.gemm is None else total


def _touched(work: Work) -> Iterator[tuple[Array, int]]:
    """Arrays, and how often each is moved: once if it is read or written, twice if both are."""
    seen: dict[tuple[int, int, tuple[int, ...]], tuple[Array, int]] = {}
    for array in (*work.reads, *work.writes):
        key = (array.storage, array.offset, array.shape)
        times = seen[key][1] if key in seen else 0
        seen[key] = (array, min(times + 1, 2))
    yield from seen.values()
