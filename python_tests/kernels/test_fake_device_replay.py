"""What a fake device recorded, done again on real memory with other data, against the reference.

As a captured graph would be replayed: nothing of Python runs, every kernel has the arguments that
it was launched with, and unwritten memory is NaN. Triton kernels run in the interpreter in
the configuration of the chip, those of the extension in the emulation of csrc/cuda.
"""

from __future__ import annotations

from itertools import filterfalse
from types import ModuleType

import pytest
import torch
from support import emulation
from support.cases import CASES, Case, Problem, build
from support.evaluation import expected, expected_of_cuda_kernels
from support.fake_device import DTYPES
from support.given_variables import streams
from support.grid import FIRST, extended_if
from support.helpers import Target
from support.tolerances import check_all
from torch import Tensor

from bench.fake_device import A100, H200, Chip, FakeDevice, Tape, fake_device
from bench.fake_device.launches import WORKSPACES
from unitsface_kernels.backends.triton import launch
from unitsface_kernels.losses import REGISTRY, LossSpec

GIVEN = ("rows", "labels", "columns", "column_labels", "index", "b", "upstream")
BY_NAME = {case.name: case for case in CASES}
# Sizes, masks and forms that take other launches.
NAMES = (
    "base",
    "columns",
    "none",
    "ignored",
    "ignored-memory",
    "none-in-batch",
    "odd-dim",
    "subset",
)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    reason = emulation.missing()
    if reason is not None:
        pytest.skip(reason)
    return emulation.shared_extension(tmp_path_factory)


def _needs_interpreter() -> None:
    if not launch.INTERPRETED:
        pytest.skip("Triton kernels were compiled for a device")


def _recorded(
    case: Case, spec: LossSpec, dtype: torch.dtype, backend: str, chip: Chip
) -> tuple[FakeDevice, Tape, dict[str, object]]:
    """The tape of a step, and places of what it was given and of what it gave."""
    with fake_device(chip, capturing=True) as device:
        problem = build(case, spec, None, dtype, "cuda")
        problem.evaluate(backend)
        leaves = problem.leaves()
        with device.recording() as tape:
            loss = problem.loss(backend, **leaves)
            loss.backward(problem.upstream.to(loss.dtype))
        places: dict[str, object] = {"loss": device.array(loss)}
        for name in GIVEN:
            value = leaves.get(name, getattr(problem, name))
            if isinstance(value, Tensor):
                places[f"given {name}"] = device.array(value)
        for name, leaf in leaves.items():
            places[name] = device.array(leaf.grad)
    return device, tape, places


def _check_replay(
    case: Case,
    spec: LossSpec,
    dtype: torch.dtype,
    backend: str,
    native: ModuleType | None,
    chip: Chip = H200,
) -> None:
    device, tape, places = _recorded(case, spec, dtype, backend, chip)
    replay = device.replay(tape, native)
    real = build(case, spec, None, dtype)
    for name in GIVEN:
        if f"given {name}" in places:
            replay.write(places[f"given {name}"], getattr(real, name))
    replay.run()
    got = {n: replay.tensor(a) for n, a in places.items() if not n.startswith("given ")}
    check_all(got, _expected(real, dtype, backend))


def _expected(problem: Problem, dtype: torch.dtype, backend: str):
    if backend == "triton":
        return expected(Target("triton", "cpu"), problem, dtype)
    return expected_of_cuda_kernels(problem, dtype)


def _grid(short: bool) -> list:
    """``short``: one small case of a loss per driver in ``make test``, else all are extended."""
    return [
        pytest.param(
            *(BY_NAME[name], spec, dtype),
            id=f"{spec.name}-{name}-{str(dtype).split('.')[1]}",
            marks=extended_if(
                not short or spec not in FIRST or name != "base" or dtype != torch.float16
            ),
        )
        for spec in filterfalse(streams, REGISTRY.values())
        for name in NAMES
        if name in BY_NAME and BY_NAME[name].applies(spec)
        for dtype in DTYPES
        if _distinct(spec, name, dtype)
    ]


def _distinct(spec: LossSpec, name: str, dtype: torch.dtype) -> bool:
    """Whether a case can go wrong in a way of its own.

    Masks, forms and sizes are a driver's, whatever the dtype; dtypes differ in GEMMs and
    conversions, whatever the case; a loss that is not the first of its driver, in what its policy
    is given in the batch or of its classes, and of a memory.
    """
    if name == "base":
        return spec in FIRST or dtype == torch.float16
    return dtype == torch.float16 and (spec in FIRST or name == "columns")


@pytest.mark.parametrize(("case", "spec", "dtype"), _grid(short=True))
def test_triton(case: Case, spec: LossSpec, dtype: torch.dtype) -> None:
    _needs_interpreter()
    _check_replay(case, spec, dtype, "triton", None)


@pytest.mark.extended
@pytest.mark.parametrize("spec", [s for s in FIRST if not streams(s)], ids=lambda spec: spec.name)
def test_triton_on_an_older_chip(spec: LossSpec) -> None:
    _needs_interpreter()
    _check_replay(BY_NAME["base"], spec, torch.bfloat16, "triton", None, A100)


@pytest.mark.parametrize(("case", "spec", "dtype"), _grid(short=False))
def test_native(case: Case, spec: LossSpec, dtype: torch.dtype, native: ModuleType) -> None:
    _check_replay(case, spec, dtype, "native", native)


@pytest.mark.extended
def test_workspaces_are_those_of_the_kernels(native: ModuleType) -> None:
    for name, function in WORKSPACES.items():
        for n, m in ((0, 5), (1, 1), (7, 129), (3072, 3072), (2048, 4096), (66_001, 131)):
            assert function(n, m) == getattr(native.cuda, f"{name}_workspace")(n, m), (name, n, m)


def test_a_value_of_the_host_is_seen() -> None:
    """The comparison can fail: a scale that Python took from the data is the old one."""
    with fake_device(answer=lambda name, args: 2.0) as device:
        x = torch.empty(4, device="cuda")
        with device.recording() as tape:
            y = x * float(x.sum())
        places = device.array(x), device.array(y)
    with pytest.raises(ValueError, match="cannot be replayed"):
        device.replay(tape).run()
    tape.work = [work for work in tape.work if work.kind != "wait"]
    replay = device.replay(tape)
    replay.write(places[0], torch.arange(4.0))
    replay.run()
    assert torch.equal(replay.tensor(places[1]), 2.0 * torch.arange(4.0))


def test_unwritten_memory_is_nan() -> None:
    with fake_device() as device:
        with device.recording() as tape:
            y = torch.empty(3, device="cuda") + 1.0
        place = device.array(y)
    replay = device.replay(tape)
    replay.run()
    assert bool(replay.tensor(place).isnan().all())
