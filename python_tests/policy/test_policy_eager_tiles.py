"""Tiles in operations of Torch: every loss that is a formula, and users' without a compiler."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.cases import CASES, HALF, Case, build, problem
from support.evaluation import check_against_reference
from support.fake_device import KINDS, allowed_bytes, check_matmuls, record
from support.grid import (
    extended_if,
    interpreted,
    interpreted_first,
    parity_cases,
    representatives,
)
from support.helpers import Target, patched_blocks
from support.policies import Contrastive, Hard, custom_problem, specs

from unitsface_kernels.backends import eager, native
from unitsface_kernels.backends.eager import EagerEngine
from unitsface_kernels.losses import REGISTRY, LossSpec, custom

NATIVE = Target("native", "cpu")
SUMS = ("sum", "pair"), ("sum", "class")
FORMULAS = [s for s in REGISTRY.values() if s.formula is not None or s.triplet is not None]
FIRST = representatives(FORMULAS)
FILTERED = [s for s in FIRST if (s.reduction, s.topology) in (*SUMS, ("logsumexp", "class"))]
CUSTOM = specs()
#: Several tiles, the last of which is not whole.
SMALL = (4, 4)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[EagerEngine]:
    """Built-in losses run on eager tiles; the engines that they run on."""
    used: list[EagerEngine] = []

    def make_engine(call, stage, gradients, run):
        used.append(EagerEngine(call))
        return used[-1]

    monkeypatch.setattr(native, "make_engine", make_engine)
    return used


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*UNITSFACE_POLICY_COMPILER.*", RuntimeWarning)
        yield


def _grid() -> list:
    return [
        pytest.param(
            *(spec, values, case, dtype),
            id=f"{name}-{str(dtype).split('.')[1]}",
            marks=extended_if(not interpreted_first(spec, values, case, dtype)),
        )
        for name, spec, values, case in parity_cases()
        if spec in FORMULAS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype == torch.float32 or (case.name in HALF and not values and spec in FIRST)
        if interpreted(spec, values, case, dtype)
    ]


@pytest.mark.parametrize(("spec", "values", "case", "dtype"), _grid())
def test_parity(
    spec: LossSpec,
    values: dict,
    case: Case,
    dtype: torch.dtype,
    tiles: list[EagerEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patched_blocks(monkeypatch, SMALL)
    loss, gradients = check_against_reference(NATIVE, build(case, spec, values, dtype), dtype)
    assert len(tiles) == (2 if spec.reduction != "sum" or case.reduction == "none" else 1)
    if case.labels == "all ignored":
        assert not bool(loss.any())
        assert not any(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.extended
@pytest.mark.parametrize("spec", FIRST, ids=lambda spec: spec.name)
def test_tiles_of_their_own_size(spec: LossSpec, tiles: list[EagerEngine]) -> None:
    names = {"tiles", "tiles-columns", "tiles-subset", "tiles-none"}
    for case in CASES:
        if case.name in names and case.applies(spec):
            check_against_reference(NATIVE, build(case, spec), torch.float32)
    assert tiles


@pytest.mark.parametrize(
    "spec",
    [
        s
        for s in FIRST
        if s.reduction == "sum" or (s.reduction, s.topology) == ("logsumexp", "class")
    ],
    ids=lambda spec: spec.name,
)
def test_filtering(
    spec: LossSpec, tiles: list[EagerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tolerance too small for any tile changes nothing, but takes the other way through."""
    patched_blocks(monkeypatch, SMALL)
    p = problem(spec, rows=13, columns=17 if spec.topology == "class" else None)
    loss, gradients = p.evaluate("native")
    p.values = {**p.values, "skip_tolerance": 1e-12}
    same, filtered = p.evaluate("native")
    torch.testing.assert_close(same, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(filtered[name], gradient, rtol=1e-4, atol=1e-6)


#: The others are extended.
SOME = ("Contrastive", "PairSoftmax")


def _losses(*left_out: str) -> list:
    return [
        pytest.param(name, marks=extended_if(name not in SOME))
        for name, spec in CUSTOM.items()
        if spec.reduction not in left_out
    ]


@pytest.mark.parametrize("name", _losses())
def test_users_losses_without_a_compiler(
    name: str, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_blocks(monkeypatch, SMALL)
    for case in CASES:
        if not case.heavy and case.applies(CUSTOM[name]):
            p = custom_problem(case, CUSTOM[name])
            check_against_reference(NATIVE, p, torch.float32)


@pytest.mark.parametrize("name", [n for n, s in CUSTOM.items() if s.reduction != "nearest"])
def test_autocast_rounds_nothing(name: str, no_compiler: None) -> None:
    p = custom_problem(Case("ad hoc"), CUSTOM[name])
    loss, gradients = p.evaluate("native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, found = p.evaluate("native")
    torch.testing.assert_close(same, loss, rtol=0.0, atol=0.0)
    for part, gradient in gradients.items():
        torch.testing.assert_close(found[part], gradient, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("low", [0.1, 0.99])
def test_negatives_may_be_left_out(
    low: float, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_blocks(monkeypatch, (4, 4))
    p = custom_problem(Case("ad hoc", rows=9, dim=8, columns=21), custom.spec(Hard()), {"low": low})
    check_against_reference(NATIVE, p, torch.float32)


def test_warns_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    eager.warn.cache_clear()
    p = custom_problem(Case("ad hoc"), custom.spec(Contrastive()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            p.evaluate("native")
    (said,) = [str(w.message) for w in caught if "Contrastive" in str(w.message)]
    for part in ("operations of Torch", "UNITSFACE_POLICY_COMPILER=off"):
        assert part in said


@pytest.mark.parametrize("name", _losses("nearest"))
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("in-batch", marks=pytest.mark.extended),
        "memory with gradient",
        pytest.param("classes", marks=pytest.mark.extended),
        "class subset",
    ],
)
def test_on_a_device_memory_is_bounded_and_nothing_waits(name: str, kind: str) -> None:
    """A custom loss on CUDA tensors with the native backend."""
    if not KINDS[kind].applies(CUSTOM[name]):
        return
    eager.warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton"):
        found = record(CUSTOM[name], KINDS[kind], torch.bfloat16, "native", make=custom_problem)
    check_matmuls(found.tape, aligned=False)
    assert found.tape.waits() == []
    assert found.tape.extra_bytes <= allowed_bytes(found.problem)


def test_a_search_runs_on_the_kernels_of_the_device(recwarn: pytest.WarningsRecorder) -> None:
    """It is the same for every formula."""
    (spec,) = (s for s in CUSTOM.values() if s.reduction == "nearest")
    found = record(spec, KINDS["classes"], torch.bfloat16, "native", make=custom_problem)
    assert "nearest_tile" in {work.name for work in found.tape.of("native")}
    assert not [str(w.message) for w in recwarn if "operations of Torch" in str(w.message)]


@pytest.mark.filterwarnings("ignore:.*Triton:RuntimeWarning")
def test_memory_does_not_grow_with_the_matrix() -> None:
    """Four times the pairs, twice the memory."""
    peaks = []
    for rows in (7_000, 14_000):
        case = Case("large", rows=rows, dim=64, topology="pair")
        spec = CUSTOM["Contrastive"]
        tape = record(spec, case, torch.float32, "native", make=custom_problem).tape
        peaks.append(tape.extra_bytes)
    assert peaks[1] < 2 * peaks[0]
    assert peaks[1] < 14_000**2
