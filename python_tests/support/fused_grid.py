"""The parity grid in tiles of the fused CUDA kernels, and what the emulated ones make of it.

    python -m support.fused_grid LIBRARY RESULTS

evaluates all of it: for a process under sanitizers, whose reference would take six times as long.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from support import emulation
from support.cases import HALF, Case, Problem, Values, build
from support.evaluation import expected_of_cuda_kernels
from support.given_variables import streams
from support.grid import FIRST, FORMS, interpreted, parity_cases
from support.tolerances import check_all
from torch import Tensor

from unitsface_kernels.losses import LossSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Copies that land at the last moment, and at random ones.
SEEDS = (0, 1, 2)
#: Losses whose sums have a kernel for sm_90a: a softplus, and one threshold.
SOFTPLUS = {"uss", "uce"}


class Entry(NamedTuple):
    name: str
    spec: LossSpec
    values: Values
    case: Case
    dtype: torch.dtype

    def problem(self) -> Problem:
        return build(self.case, self.spec, self.values, self.dtype)

    @property
    def is_for_hopper(self) -> bool:
        """Whether kernels for sm_90a have to be among those launched; others may be as well."""
        case, spec = self.case, self.spec
        served = spec.reduction == "logsumexp" or spec.name in SOFTPLUS
        some = case.rows > 0 and case.columns != 0 and case.labels != "all ignored"
        return served and some and self.dtype != torch.float32 and case.dim % 8 == 0


def grid() -> list[Entry]:
    """As of an interpreter, which takes as long; in half precision, of which the kernels for
    sm_90a are, also the forms of every loss."""
    return [
        Entry(f"{name}-{str(dtype).split('.')[1]}", spec, values, _in_tiles(case, dtype), dtype)
        for name, spec, values, case in parity_cases()
        for dtype in DTYPES
        if spec.reduction != "nearest" and not streams(spec) and _is_run(spec, values, case, dtype)
    ]


def _is_run(spec: LossSpec, values: Values, case: Case, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 or case.heavy:
        return interpreted(spec, values, case, dtype)
    return not values and case.name in (HALF if spec in FIRST else HALF & FORMS)


def _in_tiles(case: Case, dtype: torch.dtype) -> Case:
    """Up to 129 rows and columns are a whole tile and one in part. The larger depths become one of
    two chunks of 64, the last one in part, whose rows start at multiples of 16 bytes in bfloat16
    alone: of others, kernels for sm_90a take none."""
    return replace(case, dim=case.dim if case.dim <= 64 else 104 if dtype == torch.bfloat16 else 77)


class Emulated:
    """The emulated extension in this process."""

    def __init__(self, library: Path) -> None:
        self.module: ModuleType = emulation.load(library)
        self._functions = ctypes.CDLL(str(library))
        self._functions.emulation_seed.argtypes = [ctypes.c_uint64]
        self._functions.emulation_hopper_launches.restype = ctypes.c_int64

    def evaluate(self, problem: Problem, hopper: bool, seed: int) -> tuple[dict[str, Tensor], int]:
        """Loss and gradients, and how many kernels for sm_90a were launched.

        Args:
            hopper: on a device of compute capability 9.0.
            seed: of the order in which copies land.
        """
        self._functions.emulation_seed(seed)
        before = self._functions.emulation_hopper_launches()
        with emulation.fused_kernels(self.module, hopper):
            loss, gradients = problem.evaluate("native")
        launched = self._functions.emulation_hopper_launches() - before
        return {"loss": loss, **gradients}, launched

    def runs(self, entry: Entry) -> list[dict[str, Any]]:
        """With each seed, and for half precision on either device: the same results and launches
        that :meth:`evaluate` returns."""
        found = []
        for hopper in (False,) if entry.dtype == torch.float32 else (False, True):
            for seed in SEEDS:
                # The last line before a broken rule ends the process.
                what = f"{'sm_90a' if hopper else 'sm_80'}, seed {seed}"
                print(f"{entry.name}, {what}", flush=True)
                results, launched = self.evaluate(entry.problem(), hopper, seed)
                found.append({"what": what, "results": results, "launched": launched})
        return found


def check_runs(entry: Entry, runs: list[dict[str, Any]]) -> int:
    """Every result by the rule of tolerances.py; kernels for sm_90a were launched where there have
    to be some. Returns in how many runs."""
    want = expected_of_cuda_kernels(entry.problem(), entry.dtype)
    for run in runs:
        assert run["results"].keys() == want.keys()
        check_all(run["results"], want)
        if entry.is_for_hopper and "sm_90a" in run["what"]:
            assert run["launched"] > 0, (entry.name, run["what"])
    return sum(run["launched"] > 0 for run in runs)


def main(library: str, results: str) -> None:
    torch.set_num_threads(1)
    emulated = Emulated(Path(library))
    torch.save({entry.name: emulated.runs(entry) for entry in grid()}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
