"""The emulation of cp.async, ldmatrix and mma.sync finds faults: each is planted into the
kernels, and ends the program with the name of the rule that it breaks, or with results that differ.
The places are ``planted(...)`` in csrc/cuda/fused.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.emulation import SOURCES, build_program, require_tools

#: Copies that land at the last moment, and at random ones.
SEEDS = (0, 1, 2)

UNWAITED = "rule: cp.async.wait_group before reading what cp.async writes"
UNSEEN = "rule: a barrier between writing shared memory and reading it by another thread"
OVERWRITTEN = "rule: a barrier between reading shared memory and overwriting it by another thread"
IN_FLIGHT = "rule: nothing else writes where a copy is in flight"
RESULTS = "wanted"

#: What is done wrong, and the messages of which one appears; which one depends on the order.
FAULTS = {
    41: ("no cp.async.wait_group", UNWAITED),
    42: ("no barrier after cp.async.wait_group", UNSEEN, OVERWRITTEN),
    43: ("cp.async.wait_group of one group too few", UNWAITED),
    44: ("rows are read without the permutation of their chunks", RESULTS),
    45: ("two words of a fragment of rows are exchanged", RESULTS),
    46: ("the words of a fragment of columns are exchanged", RESULTS),
    47: ("a copy into the stage that is being read", IN_FLIGHT, UNWAITED, OVERWRITTEN),
    48: ("rows beyond the matrix are read", "AddressSanitizer: heap-buffer-overflow"),
    49: ("what is behind the depth of a row is read", RESULTS, "AddressSanitizer"),
    50: ("no barrier before the epilogue takes the pipeline's memory", OVERWRITTEN),
    51: ("neighboring lanes exchange the wrong columns of a gradient", RESULTS),
    52: ("the sum of a row is that of one lane", RESULTS),
    53: ("rows of ldmatrix start off 16 bytes", "rule: rows of ldmatrix are aligned to 16 bytes"),
    54: ("no cp.async.commit_group", UNWAITED),
    55: ("the pair of a row with itself counts", RESULTS),
    56: ("no barrier before sums are read", UNSEEN),
    57: ("no cvt.rna.tf32", "rule: operands of mma.sync in tf32 were rounded by cvt.rna.tf32"),
    58: ("cp.async of rows off 16 bytes", "rule: addresses of cp.async are aligned to 16 bytes"),
    59: ("a stage gets the chunks of the next step", RESULTS),
}
#: Also run by ``make test``.
FIRST = (41, 50, 57)


def _run(program: Path, fault: int, seed: int) -> subprocess.CompletedProcess[str]:
    chosen = {"EMULATION_FAULT": str(fault), "EMULATION_SEED": str(seed)}
    return subprocess.run([program], capture_output=True, text=True, env=os.environ | chosen)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_tools()
    folder = tmp_path_factory.mktemp("fused_sum")
    sources = ("fused/sum_sm80.cu", "sum_tile.cu")
    return build_program(folder, "fused_sum", *sources, losses=["uss"])


@pytest.mark.parametrize(
    "seed", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.extended) for s in SEEDS[1:])]
)
def test_sums_are_those_of_the_kernels_on_products(program: Path, seed: int) -> None:
    done = _run(program, 0, seed)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "fault", [pytest.param(k, marks=[] if k in FIRST else pytest.mark.extended) for k in FAULTS]
)
def test_a_fault_is_caught(program: Path, fault: int) -> None:
    _, *messages = FAULTS[fault]
    done = _run(program, fault, SEEDS[fault % len(SEEDS)])
    assert done.returncode != 0
    assert any(m in done.stdout + done.stderr for m in messages), done.stderr[-2000:]


def test_the_list_has_every_fault() -> None:
    text = "".join(p.read_text() for p in sorted((SOURCES / "cuda" / "fused").glob("*.cuh")))
    assert not [k for k in FAULTS if f"planted({k})" not in text]
