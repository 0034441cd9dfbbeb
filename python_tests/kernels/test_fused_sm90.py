"""The fused kernels for Hopper, run on the CPU (csrc/cuda/emulation)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.emulation import build_program, require_tools

PROGRAMS = {
    "gemm_sm90": ("fused/tensor_map.cu",),
    "total_sm90": ("fused/total_sm90.cu", "fused/tensor_map.cu"),
}
SEEDS = (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("total_sm90", [], marks=pytest.mark.extended),
        *(pytest.param(name, ["thorough"], marks=pytest.mark.slow) for name in PROGRAMS),
    ],
)
def test_kernels_compute_what_loops_compute(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    require_tools()
    program = build_program(tmp_path, name, *PROGRAMS[name])
    for seed in SEEDS:
        environment = os.environ | {"EMULATION_SEED": str(seed)}
        command = [program, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
