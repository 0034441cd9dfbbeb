"""The fused kernels for Hopper, run on the CPU (csrc/cuda/emulation)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from support import emulation
from support.emulation import build_program, require_tools

from unitsface_kernels.backends.native import fused

PROGRAMS = {
    "gemm_sm90": ("fused/tensor_map.cu",),
    "total_sm90": ("fused/total_sm90.cu", "fused/total_sm80.cu", "fused/tensor_map.cu"),
    "logsumexp_sm90": (
        "fused/logsumexp_sm90.cu",
        "fused/logsumexp_sm80.cu",
        "fused/tensor_map.cu",
        "logsumexp_tile.cu",
        "logsumexp_pairs_tile.cu",
    ),
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


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uss", "uce", "margin_softmax"])
def test_engine_gets_the_same_from_both_kernels(
    name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reason = emulation.missing()
    if reason is not None:
        pytest.skip(reason)
    module = emulation.shared_extension(tmp_path_factory)
    results = []
    for suffix in ("", "_sm90"):
        with emulation.fused_engine(module, suffix) as engine:
            assert hasattr(module.cuda, f"fused_logsumexp_tile{suffix}")
            results.append(fused._results(name, dtype, 72, torch.device("cpu"), engine))
    for key, want in results[0].items():
        difference = float((results[1][key] - want).norm() / want.norm())
        assert difference <= fused.TOLERANCES[dtype], key
