"""What the fused kernels for sm_80 and later may cost, counted from what nvcc compiles; needs no
GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.grid import extended_if

from bench.gpu_model import fused_sm80, sass

#: In ``make test``: it compiles in three seconds.
FIRST = ("total", 80)


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(source, architecture, marks=extended_if((source, architecture) != FIRST))
        for source in fused_sm80.REPRESENTATIVES
        for architecture in fused_sm80.ARCHITECTURES
    ],
)
def test_kernels_keep_to_their_budgets(source: str, architecture: int, tmp_path: Path) -> None:
    nvcc, disassembler = shutil.which("nvcc"), sass.find_cuobjdump()
    if nvcc is None or disassembler is None:
        pytest.skip("needs nvcc and cuobjdump")
    release = fused_sm80.release(nvcc)
    known = fused_sm80.load().get(release)
    if known is None:
        pytest.skip(f"nvcc {release} has no budgets: python -m bench.gpu_model.fused_sm80")
    allowed = known[f"sm_{architecture}"]
    found = fused_sm80.compile_source(nvcc, disassembler, source, architecture, tmp_path)
    broken = {key: allowed[key].broken_by(cost) for key, cost in found.items()}
    assert broken == {key: [] for key in found}


def test_there_is_a_budget_for_every_representative() -> None:
    wanted = {key for _, kernels in fused_sm80.REPRESENTATIVES.values() for key in kernels}
    for architectures in fused_sm80.load().values():
        assert {*architectures} == {f"sm_{number}" for number in fused_sm80.ARCHITECTURES}
        for kernels in architectures.values():
            assert kernels.keys() == wanted
            assert all(k.issue_cycles.keys() == fused_sm80.TYPES.keys() for k in kernels.values())


def test_a_budget_is_broken_by_what_is_more() -> None:
    budget = fused_sm80.Compiled(128, 0, 0, dict.fromkeys(fused_sm80.TYPES, 1000))
    assert (
        budget.broken_by(replace(budget, issue_cycles=budget.issue_cycles | {"tf32": 1030})) == []
    )
    slower = replace(budget, registers=129, issue_cycles=budget.issue_cycles | {"tf32": 1031})
    assert budget.broken_by(slower) == [
        "tf32: 1031 issue cycles instead of 1000",
        "registers: 129 instead of 128",
    ]


OPCODES = {
    "bf16": "HMMA.16816.F32.BF16 R16, R88, R84, R16",
    "fp16": "HMMA.16816.F32 R16, R88, R84, R16",
    "tf32": "HMMA.1688.F32.TF32 R16, R88, R84, R16",
    "fp32": "FFMA R16, R88, R84, R16",
}


def test_cycles_are_those_of_a_types_own_loop() -> None:
    """One after the other, each behind a branch, in a kernel that does nothing else."""
    counts = {key: kind.products for key, kind in fused_sm80.TYPES.items()}
    end = 16 * sum(5 + count for count in counts.values())
    lines: list[str] = []
    for key, count in counts.items():
        loop, beyond = 16 * (len(lines) + 2), 16 * (len(lines) + 5 + count)
        lines += ["ISETP.NE.AND P0, PT, R1, RZ, PT", f"@P0 BRA {beyond:#x}"]
        lines += ["LDGDEPBAR", *[OPCODES[key]] * count, f"@P1 BRA {loop:#x}", f"BRA {end:#x}"]
    lines.append("EXIT")
    text = "\n".join(f"        /*{16 * n:04x}*/    {line} ;" for n, line in enumerate(lines))
    code = sass.parse(text)
    for branches, (key, count) in enumerate(counts.items(), start=1):
        steps = fused_sm80.DEPTH * fused_sm80.TYPES[key].size // fused_sm80.STAGE_BYTES
        issued = 2 * branches + steps * (count + 2) + 2
        assert fused_sm80.issue_cycles(code, key) == 2 * issued
