"""The fused kernels for Hopper, run on the CPU (csrc/cuda/emulation)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import emulation
from support.emulation import build_program, require_tools

from unitsface_kernels.backends.native import fused
from unitsface_kernels.backends.native.fused_engine import FusedEngine
from unitsface_kernels.losses import REGISTRY

#: Sources of each program, and the losses that it has.
PROGRAMS = {
    "gemm_sm90": (["fused/tensor_map.cu"], []),
    "total_sm90": (
        ["fused/total_sm90.cu", "fused/total_sm80.cu", "fused/tensor_map.cu"],
        ["uss", "uce"],
    ),
    "logsumexp_sm90": (
        [
            *("fused/logsumexp_sm90.cu", "fused/logsumexp_sm80.cu", "fused/tensor_map.cu"),
            *("logsumexp_tile.cu", "logsumexp_pairs_tile.cu"),
        ],
        ["margin_softmax"],
    ),
    "pairs_sm90": (
        [
            *("fused/pairs_sm90.cu", "fused/pairs_sm80.cu", "fused/tensor_map.cu"),
            *("logsumexp_tile.cu", "logsumexp_pairs_tile.cu"),
        ],
        ["pair_softmax", "multi_similarity"],
    ),
    "sum_sm90": (
        [
            *("fused/sum_sm90.cu", "fused/sum_sm80.cu", "fused/tensor_map.cu", "sum_tile.cu"),
        ],
        ["uss", "uce"],
    ),
}
SEEDS = (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(pytest.param(name, [], marks=pytest.mark.extended) for name in PROGRAMS),
        *(pytest.param(name, ["thorough"], marks=pytest.mark.slow) for name in PROGRAMS),
    ],
)
def test_kernels_compute_what_loops_compute(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    require_tools()
    sources, losses = PROGRAMS[name]
    program = build_program(tmp_path, name, *sources, losses=losses)
    for seed in SEEDS:
        environment = os.environ | {"EMULATION_SEED": str(seed)}
        command = [program, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uss", "uce", "margin_softmax", "pair_softmax", "circle"])
def test_engine_gets_the_same_from_both_kernels(
    name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reason = emulation.missing()
    if reason is not None:
        pytest.skip(reason)
    module = emulation.shared_extension(tmp_path_factory)
    engines = emulation.EmulatedFusedEngine, emulation.EmulatedHopperEngine
    with emulation.fused_kernels(module):
        wanted, results = (
            fused._results(REGISTRY[name], dtype, 72, torch.device("cpu"), engine)
            for engine in engines
        )
    for key, want in wanted.items():
        difference = float((results[key] - want).norm() / want.norm())
        assert difference <= fused.TOLERANCES[dtype], key


def test_the_engine_has_kernels_for_hopper_alone() -> None:
    class Kernels:
        fused_sum_total = fused_sum_total_sm90 = fused_sum_tile = None

    engine = SimpleNamespace(native=SimpleNamespace(cuda=Kernels), _suffix="_sm90")
    assert FusedEngine._best(engine, "fused_sum_total") == "fused_sum_total_sm90"
    assert FusedEngine._best(engine, "fused_sum_tile") == "fused_sum_tile"
