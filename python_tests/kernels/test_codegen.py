"""Triton's compilation of the kernels for GPUs that need not be present.

``python -m bench.gpu_model`` prints what is compiled here, and ``--update-budgets`` makes it the
new budgets. What ``python -m bench.gpu_model.scopes`` has compiled is not compiled again.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.gpu_model import budgets, record, scopes, variants
from bench.gpu_model.chips import CHIPS
from bench.gpu_model.compile import Compiled
from bench.gpu_model.steps import KERNELS, MODELED, STEPS
from bench.gpu_model.worker import VARIANTS, Results
from bench.workloads import WORKLOADS

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ARCHITECTURES = tuple(CHIPS)


@cache
def _results(scope: str) -> Results:
    # Everything is compiled again where time does not matter.
    return scopes.run(scope, *([] if scope == "all" else ["--recorded"]))


@pytest.fixture(
    scope="module",
    params=[
        scopes.SCOPES[0],
        pytest.param(scopes.SCOPES[1], marks=pytest.mark.extended),
        pytest.param(scopes.SCOPES[2], marks=pytest.mark.slow),
    ],
)
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(scope: str) -> Results:
    pytest.importorskip("triton")
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    if not (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton has no cuobjdump")
    return _results(scope)


@pytest.fixture(scope="module")
def kernels(results: Results) -> list[Compiled]:
    return results.kernels


def _listed(kernels: list[Compiled]) -> str:
    return "\n".join(map(str, kernels))


def _chip(kernel: Compiled):
    return CHIPS[kernel.architecture]


def test_steps_cover_the_named_workloads() -> None:
    """Each loss, kind of columns and filtering that runs on CUDA."""

    def kinds(names) -> set[tuple]:
        found = [WORKLOADS[name] for name in names if name in WORKLOADS]
        return {(w.loss, w.topology, bool(w.skip_tolerance)) for w in found}

    assert kinds(KERNELS) == kinds(name for name, w in WORKLOADS.items() if "cuda" in w.on)
    assert {*KERNELS, *MODELED} <= STEPS.keys()


def test_every_kernel_is_compiled(kernels: list[Compiled], scope: str) -> None:
    from unitsface_kernels.backends.triton import kernels as package

    names = set()
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        names |= {name for name in members if name.endswith("_kernel")}
    for (triton, architecture), tasks in scopes.tasks(scope).items():
        place = (triton.version, architecture)
        here = [kernel for kernel in kernels if (kernel.triton, kernel.architecture) == place]
        if not tasks[-1].startswith(VARIANTS):
            assert {kernel.kernel for kernel in here} < names
            continue
        assert {kernel.kernel for kernel in here} == names
        # Kernels with a GEMM have every dtype.
        of_gemms = {kernel.kernel for kernel in here if kernel.gemm is not None}
        dtypes = variants.dtypes(architecture) if "bfloat16" not in tasks[-1] else ["bfloat16"]
        for dtype in dtypes:
            labels = {k.kernel for k in here if k.label.startswith(dtype)}
            assert of_gemms - {k.kernel for k in here if k.label in KERNELS} <= labels


def test_no_kernel_spills_has_a_stack_or_serializes(kernels: list[Compiled]) -> None:
    """A performance warning of ptxas is one of serialized matmuls: C7510 and its neighbors."""
    wasteful = [kernel for kernel in kernels if kernel.stack or kernel.local or kernel.warnings]
    assert not wasteful, _listed(wasteful)


def test_the_record_is_what_is_compiled(kernels: list[Compiled]) -> None:
    """Kernels that are compiled here although they are recorded."""
    known = record.load()
    for kernel in kernels:
        if record.is_checked(kernel.key_of_ir) and kernel.key_of_ir in known:
            assert record.row(kernel) == known[kernel.key_of_ir], str(kernel)


def test_matmuls_run_on_tensor_cores(kernels: list[Compiled]) -> None:
    """float32 does not: without TF32 there is no tensor core that is exact enough."""
    matmuls = [kernel for kernel in kernels if kernel.gemm is not None]
    assert matmuls
    slow = [
        kernel
        for kernel in matmuls
        if kernel.dtype != "fp32" and TENSOR_CORES[kernel.architecture] not in kernel.families
    ]
    assert not slow, _listed(slow)


def test_the_gemm_of_a_tile_is_found_in_its_code(kernels: list[Compiled]) -> None:
    """Multiplications of its instructions are those of its shape, in a loop or unrolled."""
    for kernel in kernels:
        if kernel.gemm is not None and kernel.tensor_cores:
            counted = kernel.inside["TENSOR"]
            assert counted == kernel.products, str(kernel)
            assert kernel.gemm.depth == (kernel.gemm.step if kernel.gemm.open else 512), str(kernel)


def test_shared_memory_fits(kernels: list[Compiled]) -> None:
    large = [kernel for kernel in kernels if kernel.shared > _chip(kernel).device.shared_bytes]
    assert not large, _listed(large)


def test_capped_kernels_share_an_sm(kernels: list[Compiled]) -> None:
    """That is what the cap on their registers is for; 255 are all that there are."""
    capped = [k for k in kernels if k.max_registers is not None and k.max_registers < 255]
    assert capped
    alone = [kernel for kernel in capped if budgets.cost(kernel).programs < 2]
    assert not alone, _listed(alone)


def test_kernels_keep_to_their_budgets(kernels: list[Compiled]) -> None:
    """After a change that is worth it: ``python -m bench.gpu_model --update-budgets``."""
    allowed = budgets.load()
    of_workloads = [kernel for kernel in kernels if kernel.label in KERNELS]
    assert allowed.keys() & {kernel.triton for kernel in of_workloads}
    broken = budgets.violations(of_workloads, allowed)
    assert not broken, "\n".join(broken)


def test_a_step_is_predicted_from_its_launches(results: Results) -> None:
    assert results.steps
    for triton, architecture, step in results.steps:
        where = f"Triton {triton}, sm_{architecture}"
        names = {kernel.kernel for kernel in results.kernels}
        assert {"gradient_kernel", "statistics_kernel", "library GEMMs"} <= step.groups.keys()
        assert {name for name in step.groups if name.endswith("_kernel")} <= names, where
        assert sum(group.count for group in step.groups.values()) == step.launches, where
        # The library's GEMMs are half of the step's.
        assert step.groups["library GEMMs"].flops == step.flops / 2, where
        assert 0.1 < step.roofline_fraction < 1.0, where
        assert step.host_seconds is not None, where
        assert step.host_seconds > 0, where
