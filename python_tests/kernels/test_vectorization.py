"""Loops of the CPU kernels that are marked for vectorization are vectorized, in every instance.

A loop that is not takes five times as long, and computes the same: no other test would show it.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support.compiled import COMPILER, needs_compiler
from support.grid import extended_if
from support.variables import Curricular, Everything, Scales, Tempered

from unitsface_kernels.backends.native.custom import shared_object
from unitsface_kernels.losses import REGISTRY, LossSpec, custom

SETS = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
FLAGS = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
#: A sum, a log-sum-exp over classes, and every kind of variable.
FIRST = ("uss", "margin_softmax", "Everything")
SPECS: dict[str, LossSpec] = {
    **{name: spec for name, spec in REGISTRY.items() if spec.reduction != "nearest"},
    **{of.__name__: custom.spec(of()) for of in (Everything, Curricular, Tempered, Scales)},
}


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _is_marked(path: Path, number: int) -> bool:
    """Whether a line is the head of a marked loop, or of its body.

    The body may be a lambda just above, whose lines the compiler names.
    """
    lines = _lines(path)
    if number < 1 or number > len(lines):
        return False
    before = lines[max(0, number - 3) : number]
    below = 5 if any("UF_INLINED" in line for line in before) else 0
    return any("omp simd" in line for line in [*before, *lines[number : number + below]])


def _reports(spec: LossSpec, instructions: str, folder: Path) -> list[tuple[str, int, str]]:
    """(header, line, message) of each loop that was vectorized or not."""
    source, headers = folder / "policy.cpp", shared_object.headers()
    source.write_text(shared_object.source_of(spec))
    says = subprocess.run(
        [COMPILER, *FLAGS.split(), *SETS[instructions].split(), f"-DUF_ISA={instructions}",
         "-fopt-info-vec-all", f"-I{headers}", f"-I{headers / 'include'}", "-c", source, "-o",
         folder / "policy.o"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    pattern = r"^(\S+?):(\d+):\d+: \w+:\s+(couldn't vectorize loop|loop vectorized using \d+ byte)"
    return [(path, int(line), m) for path, line, m in re.findall(pattern, says, re.MULTILINE)]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        pytest.param(name, instructions, marks=extended_if(rare or name not in FIRST))
        for instructions, rare in (("avx2", True), ("avx512", False))
        for name in SPECS
    ],
)
def test_marked_loops_are_vectorized(name: str, instructions: str, tmp_path: Path) -> None:
    reports = _reports(SPECS[name], instructions, tmp_path)
    if not any("using" in message for *_, message in reports):
        pytest.skip("this compiler does not say what it vectorizes")
    headers = shared_object.headers()
    marked = [
        (Path(path).name, line, message)
        for path, line, message in reports
        if Path(path).is_relative_to(headers) and _is_marked(Path(path), line)
    ]
    widest = {"avx2": "32", "avx512": "64"}[instructions]
    assert any(f"using {widest} byte" in message for *_, message in marked)
    assert [place for *place, message in marked if "couldn't" in message] == []
