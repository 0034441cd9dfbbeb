"""``python -m bench.gpu_check.rates``: what the device does at best, measured.

GEMMs of the shapes that the losses call the library with, a copy through device memory, and the
rate at which the multiprocessors read data that lie in the second-level cache. Random data: on
zeros a GEMM takes less power and runs faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import environment, timing
from .files import write_json

COPIED = 1 << 31  # bytes
#: Sizes of the data that are read again and again.
REREAD_MB = (4, 8, 16, 32)
BLOCK, WARPS, PROGRAMS_PER_SM = 4096, 8, 4


@dataclass(frozen=True)
class Gemm:
    """(m, k) @ (k, n) in bfloat16.

    Attributes:
        accumulates: added to a float32 matrix, as gradients are; else into a new bfloat16 one.
        why: where it occurs.
    """

    m: int
    n: int
    k: int
    accumulates: bool
    why: str

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def call(self) -> Callable[[], object]:
        shape = (self.m, self.n)
        left, right = _normal(self.m, self.k), _normal(self.k, self.n)
        if not self.accumulates:
            return partial(torch.mm, left, right, out=left.new_empty(shape))
        total = torch.zeros(shape, dtype=torch.float32, device="cuda")
        return partial(torch.addmm, total, left, right, out_dtype=torch.float32, out=total)


GEMMS = {
    "large": Gemm(8192, 8192, 8192, False, "the ceiling"),
    "rows-4096": Gemm(4096, 512, 4096, True, "a gradient tile of 32 MB, in-batch"),
    "rows-8192": Gemm(8192, 512, 8192, True, "a gradient tile of 128 MB, in-batch"),
    "split-k": Gemm(1024, 512, 16384, True, "the rows' gradient of a tile of classes"),
    "columns": Gemm(16384, 512, 1024, True, "the columns' gradient of a tile of classes"),
}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def gemms() -> dict[str, dict[str, Any]]:
    """FLOP/s of each: with operands still in the cache, and with none of them there."""
    found: dict[str, dict[str, Any]] = {}
    flush = timing.CacheFlush()
    for name, gemm in GEMMS.items():
        row: dict[str, Any] = {"m": gemm.m, "n": gemm.n, "k": gemm.k, "why": gemm.why}
        try:
            call = gemm.call()
            repeats = max(round(1e12 / gemm.flops), 1)
            row["warm"] = gemm.flops / timing.median(call, repeats=min(repeats, 20))
            row["cold"] = gemm.flops / timing.median(call, at_least=0.02, before=flush)
        except (RuntimeError, TypeError) as error:  # an older Torch has no such accumulation
            row["error"] = str(error).splitlines()[0]
        found[name] = row
    return found


def copy_bytes() -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    source = torch.randn(COPIED // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / timing.median(partial(target.copy_, source))


def ceilings() -> dict[str, float]:
    """The two that a roofline needs."""
    large = GEMMS["large"]
    return {"gemm_flops": large.flops / timing.median(large.call()), "copy_bytes": copy_bytes()}


def reread_bytes(megabytes: int, sms: int) -> float:
    """Bytes per second that all multiprocessors together load from the second-level cache.

    Programs load parts of the data past the first-level cache, each part read by many of them.
    """
    from .reread import reread_kernel

    count = (megabytes << 20) // 4
    source = torch.randn(count, device="cuda")
    programs = sms * PROGRAMS_PER_SM
    out = torch.empty(programs, device="cuda")
    blocks = count // BLOCK
    # About a gigabyte and a half: much longer than a launch.
    turns = max((3 << 29) // (programs * BLOCK * 4), 1)

    def run() -> None:
        reread_kernel[(programs,)](source, out, blocks, turns, BLOCK=BLOCK, num_warps=WARPS)

    times = timing.seconds(run, at_least=0.05)
    return 4.0 * BLOCK * turns * programs / statistics.median(times)


def clock_under_load() -> float | None:
    """MHz of the multiprocessors during multiplications; None if the driver does not report it."""
    call = GEMMS["large"].call()
    for _ in range(500):  # about a second, which the driver's answer comes within
        call()
    reported = environment.clocks().get("clocks.sm", "")
    torch.cuda.synchronize()
    try:
        return float(reported)
    except ValueError:
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.rates", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args(arguments).out
    report: dict[str, Any] = {}

    def add(name: str, measure: Callable[[], object]) -> None:
        try:
            report[name] = measure()
        except Exception as error:  # the other rates are still of use
            report[name] = None
            report.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:300]
        print(name, report[name], flush=True)
        if out is not None:
            write_json(out, report)

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    add("clock_mhz", clock_under_load)
    add("copy_bytes", copy_bytes)
    add("l2_bytes", lambda: {f"{size} MB": reread_bytes(size, sms) for size in REREAD_MB})
    clock = report["clock_mhz"]
    if report["l2_bytes"] and clock:
        # Bytes per multiprocessor and cycle, the model's least certain number.
        add(
            "l2_bytes_per_clock",
            lambda: {k: v / sms / clock / 1e6 for k, v in report["l2_bytes"].items()},
        )
    add("gemms", gemms)
    return 1 if "errors" in report else 0


if __name__ == "__main__":
    sys.exit(main())
