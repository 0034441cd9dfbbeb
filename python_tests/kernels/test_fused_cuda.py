"""The fused CUDA kernels (csrc/cuda/fused), emulated: parity, whole losses through their engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import emulation
from support.fused_grid import Emulated, Entry, check_runs, grid
from torch import Tensor

from unitsface_kernels.backends.native import fused
from unitsface_kernels.backends.native.cuda_engine import CudaEngine
from unitsface_kernels.backends.native.fused_engine import FusedEngine
from unitsface_kernels.backends.streaming import ClassTile, ClassWeights


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    reason = emulation.missing()
    if reason is not None:
        pytest.skip(reason)
    return emulation.shared_extension(tmp_path_factory)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("test", "kernels", "losses"),
    [
        ("fused_logsumexp", ("logsumexp", "logsumexp_tile"), ["margin_softmax"]),
        ("fused_pairs", ("pairs",), ["pair_softmax", "multi_similarity"]),
    ],
)
def test_tiles_are_those_of_the_kernels_on_products(
    test: str, kernels: tuple[str, ...], losses: list[str], tmp_path: Path
) -> None:
    """Seeds of log-sum-exps; test_fused_mutations.py has those of sums."""
    emulation.require_tools()
    first, *others = kernels
    sources = [f"fused/{first}_sm80.cu", "logsumexp_pairs_tile.cu", *(f"{k}.cu" for k in others)]
    program = emulation.build_program(tmp_path, test, *sources, losses=losses)
    for seed in range(3):
        chosen = os.environ | {"EMULATION_SEED": str(seed)}
        done = subprocess.run([program], capture_output=True, text=True, env=chosen)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


class _Wrong(emulation.EmulatedFusedEngine):
    """Differs in the gradient of one driver."""

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        return 1.1 * super().logsumexp_gradient_tile(tile, rows)


@pytest.mark.extended
def test_the_check_of_a_device_compares_the_engines(extension: ModuleType) -> None:
    with emulation.fused_kernels(extension):
        found = fused.differences(torch.device("cpu"), (emulation.EmulatedEngine, _Wrong))
    assert found
    for text in found:
        assert text.startswith("margin_softmax")
        assert " loss " not in text


def test_a_verdict_is_kept_and_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = []

    def differences(device: torch.device) -> list[str]:
        checked.append(device.index)
        return ["uss float32 D=72 rows by 3.0e-01"]

    monkeypatch.setattr(fused, "differences", differences)
    monkeypatch.setattr(fused, "_name", lambda device: "Some device")
    monkeypatch.setattr(fused, "_path", lambda device: tmp_path / f"{device.index}.json")
    for index in (0, 0, 1):  # as three processes
        with pytest.raises(
            RuntimeError, match=r"Some device the fused CUDA kernels differ.*3\.0e-01"
        ):
            fused.require_same.__wrapped__(index)
    assert checked == [0, 1]


def test_only_the_environment_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(fused, "require_same", checked.append)
    device = torch.device("cuda", 0)
    monkeypatch.delenv("UNITSFACE_FUSED_CUDA", raising=False)
    assert fused.engine_class(device) is CudaEngine
    assert checked == []
    monkeypatch.setenv("UNITSFACE_FUSED_CUDA", "1")
    assert fused.engine_class(device) is FusedEngine
    assert checked == [0]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, extension: ModuleType) -> Emulated:
    assert extension.__file__ is not None
    return Emulated(Path(extension.__file__))


@pytest.mark.extended
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in grid()])
def test_parity(entry: Entry, emulated: Emulated) -> None:
    check_runs(entry, emulated.runs(entry))


@pytest.mark.slow
def test_parity_under_sanitizers(tmp_path: Path) -> None:
    """All of the grid, in a process of its own: five minutes of a core."""
    emulation.require_tools()
    library, results = emulation.build_extension(tmp_path, sanitize=True), tmp_path / "results"
    command = [sys.executable, "-m", "support.fused_grid", str(library), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=emulation.sanitized())
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-6000:]
    runs = torch.load(results, weights_only=True)
    on_hopper = [check_runs(entry, runs[entry.name]) for entry in grid()]
    assert sum(launched > 0 for launched in on_hopper) >= sum(e.is_for_hopper for e in grid()) >= 50
