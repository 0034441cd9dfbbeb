"""The emulation of Hopper finds faults: each is planted into the kernels, and ends the program
with the name of the rule that it breaks. The places are ``planted(...)`` in csrc/cuda/fused.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.emulation import build_program, require_tools

#: Copies that land at the last moment, and at random ones.
SEEDS = (0, 1)

NEVER_ENDS = "every wait ends: mbarrier.try_wait: a phase whose arrivals or bytes never come"
OVERWRITTEN = "a copy does not overwrite one without a wait between them"
TOO_MANY = "an mbarrier has no more arrivals in a phase than its count"
UNFENCED = "fence.proxy.async between the writes of threads and a bulk store that reads them"
UNREAD = "cp.async.bulk.wait_group.read before the buffer of a bulk store is written again"
UNSEEN = "a wait for the phase of a copy before wgmma reads it"
UNFINISHED = "cp.async.bulk.wait_group before the block ends"
REUSED = "a copy does not overwrite what is still being read"
REUSED_ELSEWHERE = "a copy does not overwrite what another block still reads"
OVERTAKEN = (REUSED, REUSED_ELSEWHERE, "a barrier between wgmma.wait_group and the next copy")
UNCOUNTED = "mbarrier.expect_tx counts what other blocks copy, too"

#: What is done wrong, and the rules of which one is named; which one depends on the order.
FAULTS = {
    1: ("no fence after mbarrier.init", "fence.mbarrier_init before the asynchronous proxy"),
    2: ("no barrier after mbarrier.init", "a barrier between mbarrier.init and the use"),
    3: ("rows copied before the last ones are released", TOO_MANY, OVERWRITTEN, REUSED),
    4: ("columns copied before their stage is released", TOO_MANY, OVERWRITTEN, REUSED),
    5: ("wrong phase of an empty stage", NEVER_ENDS),
    6: ("expect-tx of one tile too many", NEVER_ENDS),
    7: ("expect-tx of half a tile", "mbarrier.expect_tx announces the bytes of every copy"),
    8: ("a copy into the wrong stage", "wgmma reads what a copy has written", OVERWRITTEN, REUSED),
    9: ("no wait for rows", UNSEEN),
    10: ("no wait for columns", UNSEEN),
    11: ("wrong phase of a full stage", NEVER_ENDS, UNSEEN),
    12: ("wrong stride of a descriptor", "a descriptor reads rows and columns in the order"),
    13: ("wrong swizzle of a descriptor", "a descriptor has the swizzle of the copy"),
    14: ("no wgmma.fence", "wgmma.fence before the first wgmma of a group"),
    15: (
        "a descriptor steps beyond its chunk",
        "wgmma reads what a copy has written",
        "a descriptor reads rows and columns in the order",
    ),
    16: ("no wgmma.wait_group before a stage is released", REUSED, REUSED_ELSEWHERE),
    17: ("wrong count of a named barrier", "all threads of a named barrier give the same count"),
    18: ("no arrival at a named barrier", "every wait ends: bar.sync"),
    19: ("no wgmma.wait_group before the epilogue", "wgmma.wait_group before the registers"),
    20: ("a store's buffer written before it was read", UNREAD),
    21: ("no barrier after wait_group.read", "a barrier between wait_group.read and the next"),
    22: ("a store's buffer without swizzle", "the rows of a stmatrix lie in different banks"),
    23: ("no fence.proxy.async before a store", UNFENCED),
    24: (
        "no barrier between fence.proxy.async and a store",
        UNFENCED,
        "a barrier between fence.proxy.async and a bulk store",
    ),
    25: (
        "the block ends before its stores have read",
        "cp.async.bulk.wait_group before the block ends",
    ),
    26: ("the wrong stage is released", NEVER_ENDS, TOO_MANY, REUSED),
    27: ("setmaxnreg of more registers than there are", "every wait ends: setmaxnreg.inc"),
    # Of clusters.
    71: ("an empty stage counts one block's arrivals", TOO_MANY, *OVERTAKEN),
    72: (
        "a barrier of the block alone after mbarrier.init",
        "a cluster barrier between mbarrier.init and the use by another block",
    ),
    73: (
        "both blocks copy the same share",
        "a copy does not write what another one is writing",
        OVERWRITTEN,
    ),
    74: ("a share is copied to its own block alone", NEVER_ENDS),
    75: (
        "expect-tx without the other block's share",
        UNCOUNTED,
        "mbarrier.expect_tx announces the bytes of every copy",
    ),
    76: ("a stage is released to its own block alone", NEVER_ENDS),
    77: ("both arrivals at the first block", TOO_MANY, NEVER_ENDS, *OVERTAKEN),
    78: (
        "no cluster barrier before a block ends",
        "a block has not ended when others access its shared memory",
        "a cluster barrier between arrivals at another block's mbarriers and its end",
    ),
    79: ("a block does not wait for the other one's consumers", UNCOUNTED, *OVERTAKEN),
    80: ("a block without rows does not release its stages", NEVER_ENDS),
    # Of rows that pass through the ring.
    81: (
        "a chunk of rows into the wrong stage",
        "wgmma reads what a copy has written",
        "a copy does not write what another one is writing",
        OVERWRITTEN,
        REUSED,
    ),
}
#: The same of what shows only where some copies land early.
EARLY_FAULTS = {82: ("rows are released before all lanes have waited for them", NEVER_ENDS)}
#: Also run by ``make test``: a copy, a product and a store.
FIRST = (10, 14, 23)
#: The same of what only kernels with an epilogue do.
EPILOGUE_FAULTS = {
    28: (
        "no barrier between the labels' writes and reads",
        "a barrier between writing shared memory and reading it",
    ),
}
#: The same of pairs of samples.
PAIR_FAULTS = {
    41: (
        "no barrier between the columns' writes and reads",
        "a barrier between writing shared memory and reading it",
    ),
    42: (
        "no barrier before the warps' sums of a column are folded",
        "a barrier between writing shared memory and reading it",
    ),
    43: (
        "lanes without positives pass by the sum of a column",
        "every wait ends: a barrier or shuffle",
    ),
}


def run(program: Path, fault: int, seed: int) -> subprocess.CompletedProcess[str]:
    chosen = {"EMULATION_FAULT": str(fault), "EMULATION_SEED": str(seed)}
    return subprocess.run([program], capture_output=True, text=True, env=os.environ | chosen)


def require_caught(program: Path, faults: dict[int, tuple[str, ...]], seed: int) -> None:
    missed = {}
    for fault, (what, *rules) in faults.items():
        done = run(program, fault, seed)
        if done.returncode == 0 or not any(f"rule: {rule}" in done.stderr for rule in rules):
            missed[fault, what] = (done.returncode, done.stderr[-500:])
    assert not missed


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_tools()
    return build_program(tmp_path_factory.mktemp("gemm"), "gemm_sm90", "fused/tensor_map.cu")


def test_some_faults_are_caught(gemm: Path) -> None:
    assert run(gemm, 0, SEEDS[0]).returncode == 0
    require_caught(gemm, {fault: FAULTS[fault] for fault in FIRST}, SEEDS[0])


@pytest.mark.extended
@pytest.mark.parametrize("seed", SEEDS)
def test_each_fault_is_caught(gemm: Path, seed: int) -> None:
    assert run(gemm, 0, seed).returncode == 0
    require_caught(gemm, FAULTS if seed == 0 else FAULTS | EARLY_FAULTS, seed)


@pytest.mark.extended
def test_each_fault_of_an_epilogue_is_caught(tmp_path: Path) -> None:
    require_tools()
    kernels = ("fused/total_sm90.cu", "fused/total_sm80.cu", "fused/tensor_map.cu")
    program = build_program(tmp_path, "total_sm90", *kernels, losses=["uss", "uce"])
    for seed in SEEDS:
        require_caught(program, EPILOGUE_FAULTS, seed)


@pytest.mark.extended
def test_each_fault_of_pairs_is_caught(tmp_path: Path) -> None:
    require_tools()
    kernels = [
        *("fused/pairs_sm90.cu", "fused/pairs_sm80.cu", "fused/tensor_map.cu"),
        *("logsumexp_tile.cu", "logsumexp_pairs_tile.cu"),
    ]
    losses = ["pair_softmax", "multi_similarity"]
    program = build_program(tmp_path, "pairs_sm90", *kernels, losses=losses)
    for seed in SEEDS:
        require_caught(program, PAIR_FAULTS, seed)


def test_the_list_has_every_fault() -> None:
    folder = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "fused"
    text = "".join(path.read_text() for path in sorted(folder.glob("*sm90*")))
    faults = FAULTS | EARLY_FAULTS | EPILOGUE_FAULTS | PAIR_FAULTS
    missing = [k for k in faults if f"planted({k})" not in text]
    assert not missing
