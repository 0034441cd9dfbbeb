"""The fused CUDA kernels (csrc/cuda/fused), emulated: parity, whole losses through their engine."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support import emulation
from support.cases import HALF, Case, Values, build
from support.evaluation import expected_of_cuda_kernels
from support.given_variables import streams
from support.grid import FIRST, interpreted, parity_cases, small
from support.tolerances import check_all

from unitsface_kernels.losses import LossSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    reason = emulation.missing()
    if reason is not None:
        pytest.skip(reason)
    return emulation.shared_extension(tmp_path_factory)


def _grid() -> list:
    """As of an interpreter, which takes as long."""
    return [
        pytest.param(spec, values, small(case), dtype, id=f"{name}-{str(dtype).split('.')[1]}")
        for name, spec, values, case in parity_cases()
        for dtype in DTYPES
        if interpreted(spec, values, case, dtype)
        and spec.reduction != "nearest"
        and not streams(spec)
        and (dtype == torch.float32 or (case.name in HALF and not values and spec in FIRST))
    ]


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
    """Those of sums: test_fused_mutations.py."""
    emulation.require_tools()
    first, *others = kernels
    sources = [f"fused/{first}_sm80.cu", "logsumexp_pairs_tile.cu", *(f"{k}.cu" for k in others)]
    program = emulation.build_program(tmp_path, test, *sources, losses=losses)
    for seed in range(3):
        chosen = os.environ | {"EMULATION_SEED": str(seed)}
        done = subprocess.run([program], capture_output=True, text=True, env=chosen)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.extended
def test_the_check_of_a_device_compares_the_engines(extension: ModuleType) -> None:
    with emulation.fused_engine(extension) as engine:
        cublas = engine.__mro__[1]
        same = fused.differences(torch.device("cpu"), (engine, engine))
        del cublas
    assert same == []


@pytest.mark.extended
@pytest.mark.parametrize(("spec", "values", "case", "dtype"), _grid())
def test_parity(
    spec: LossSpec, values: Values, case: Case, dtype: torch.dtype, extension: ModuleType
) -> None:
    problem = build(case, spec, values, dtype)
    want = expected_of_cuda_kernels(problem, dtype)
    with emulation.fused_engine(extension):
        loss, gradients = problem.evaluate("native")
    check_all({"loss": loss, **gradients}, want)
