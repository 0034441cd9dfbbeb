"""Users' losses on the CPU, compiled: as accurate as built-in ones, and known by their names."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.cases import CASES, HALF, THRESHOLDS, Case
from support.compiled import failure, needs_compiler, shared_objects
from support.evaluation import check_against_reference
from support.grid import extended_if
from support.helpers import Target, patched_blocks
from support.policies import (
    DRIVERS,
    POLICIES,
    Contrastive,
    Hard,
    Unified,
    custom_problem,
    specs,
)

from unitsface_kernels import fused_uss_loss, policy
from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.native.custom import shared_object
from unitsface_kernels.losses import CUSTOM, REGISTRY, LossSpec, custom, find

NATIVE = Target("native", "cpu")
SPECS = specs()
OBJDUMP = shutil.which("objdump")

pytestmark = needs_compiler


FIRST = {"axes", "base", "columns", "tiles-columns"}


def _grid() -> list:
    found = []
    for name, spec in SPECS.items():
        for case in CASES:
            if not case.applies(spec):
                continue
            of_threshold = "per column" in name and case.name in THRESHOLDS
            often = case.name in FIRST or of_threshold
            for dtype in (torch.float32, torch.bfloat16):
                half = dtype != torch.float32
                if name in DRIVERS or (often and not half):
                    if half and case.name not in HALF:
                        continue
                    marks = extended_if(half or not often)
                    values = (spec, case, dtype)
                    kind = str(dtype).split(".")[1]
                    label = f"{name}-{case.name}-{kind}".replace(" ", "-")
                    found.append(pytest.param(*values, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("spec", "case", "dtype"), _grid())
def test_parity(spec: LossSpec, case: Case, dtype: torch.dtype) -> None:
    assert failure(spec) is None
    problem = custom_problem(case, spec, {}, dtype)
    loss, gradients = check_against_reference(NATIVE, problem, dtype)
    if case.labels == "all ignored":
        assert not bool(loss.any())
        assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_results_are_those_of_the_built_in_loss() -> None:
    """The same formula, compiled by the same compiler or not, in the same loops."""
    p = custom_problem(Case("ad hoc", rows=300, dim=64), custom.spec(Unified()))
    rows, other = (p.rows.clone().requires_grad_() for _ in range(2))
    mine = p.loss("native", rows=rows)
    built_in = fused_uss_loss(other, p.labels, p.b, scale=16.0, margin=0.1, backend="native")
    mine.backward()
    built_in.backward()
    torch.testing.assert_close(mine, built_in)
    torch.testing.assert_close(rows.grad, other.grad)


@pytest.mark.parametrize("low", [0.1, 0.99])
def test_negatives_may_be_left_out(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    patched_blocks(monkeypatch, (4, 4))
    p = custom_problem(Case("ad hoc", rows=9, dim=8, columns=21), custom.spec(Hard()), {"low": low})
    check_against_reference(NATIVE, p, torch.float32)


@pytest.mark.parametrize("name", list(SPECS))
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Loops run on the extension's threads; nothing else is started."""
    p = custom_problem(Case("ad hoc", rows=201, columns=333, dim=32), SPECS[name])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(p.evaluate("native"))
    finally:
        torch.set_num_threads(before)
    loss, gradients = results[0]
    for other, others in results[1:]:
        assert torch.equal(other, loss)
        assert all(torch.equal(others[n], g) for n, g in gradients.items())


def test_a_loss_is_an_operator_of_torch() -> None:
    """Under a dispatch mode, and by its name alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    p = custom_problem(Case("ad hoc", rows=40), custom.spec(Contrastive()))
    want, gradients = p.evaluate("native")
    with Watch():
        loss, found = p.evaluate("native")
    assert torch.equal(loss, want)
    assert torch.equal(found["rows"], gradients["rows"])


def test_losses_are_found_by_name() -> None:
    for instance in POLICIES:
        spec = custom.spec(instance)
        assert find(spec.name) is spec is custom.spec(type(instance)()) is policy.spec(instance)
        assert spec.name in CUSTOM
        assert spec.name not in REGISTRY
    assert find("uss") is REGISTRY["uss"]
    with pytest.raises(LookupError, match="no loss 'other'"):
        find("other")


def test_a_name_identifies_its_formula() -> None:
    """Constants that agree in their first digits are different formulas."""

    def made(constant: float, default: float = 0.4):
        class Same(policy.Pair):
            margin: policy.Number = default

            def positive(self, c):
                return constant - c

            def negative(self, c):
                return policy.maximum(c - self.margin, 0)

        return custom.spec(Same()).name

    assert made(1.0) == made(1.0)
    assert len({made(1.0), made(1.0000001), made(1.0, 0.3)}) == 3


def test_the_digest_of_shared_terms_is_short_work() -> None:
    class Deep(policy.Pair):
        def positive(self, c):
            return 1 - c

        def negative(self, c):
            for _ in range(60):
                c = 0.5 * (c + policy.square(c))
            return c

    start = time.process_time()
    custom.digest(Deep.formula)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("columns", [None, 5])
def test_a_nan_reaches_the_loss(name: str, columns: int | None) -> None:
    """In the rows that the reference has it in, and nowhere else."""
    spec = SPECS[name]
    p = custom_problem(Case("ad hoc", rows=9, columns=columns, reduction="none"), spec)
    for bad in (float("nan"), float("inf")):
        p.rows[4, 7] = bad
        want, _ = p.evaluate("reference")
        loss, _ = p.evaluate("native")
        assert bool(want[4].isnan())
        assert torch.equal(loss.isnan(), want.isnan())


def test_a_loss_with_many_numbers() -> None:
    """More than any built-in one has: each is a constant of its kernels."""
    names = [f"a{i}" for i in range(12)]

    def negative(self, c):
        found = 0
        for name in names:
            found = found * c + policy.sigmoid(getattr(self, name) - c)
        return found

    members = {
        "__annotations__": dict.fromkeys(names, policy.Number),
        **{name: 0.1 * i for i, name in enumerate(names)},
        "positive": lambda self, c: 1 - c,
        "negative": negative,
    }
    spec = custom.spec(type("Many", (policy.Pair,), members)())
    assert failure(spec) is None
    p = custom_problem(Case("ad hoc", rows=9), spec)
    check_against_reference(NATIVE, p, torch.float32)


def _instructions(path: Path, struct: str) -> dict[str, int]:
    """Numbers of instructions of the functions of a policy, without those that only fill up."""
    run = [str(OBJDUMP), "-dC", "--no-show-raw-insn", str(path)]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    isa = shared_object.isa_of(loader.extension())
    found: dict[str, int] = {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", text):
        name = function.partition("<")[2].partition(">:")[0]
        if f"::{isa}::" in name and f"{isa}::{struct}" in name:
            lines = re.findall(r"^ +[0-9a-f]+:\s+(?!nop|xchg|data16|cs )\S", function, re.MULTILINE)
            found[name.replace(f"{isa}::{struct}", f"{isa}::Policy")] = len(lines)
    return found


@pytest.mark.skipif(OBJDUMP is None, reason="needs objdump")
def test_a_compiled_loss_has_the_instructions_of_the_built_in_one(fresh: Path) -> None:
    """At most 5 % more, if the extension was compiled by another compiler."""
    assert failure(custom.spec(Unified())) is None
    (kept,) = shared_objects(fresh)
    mine = _instructions(kept, "Policy")
    built_in = _instructions(Path(loader.extension().__file__), "USS")
    rows = [name for name in mine.keys() & built_in.keys() if "_row<" in name]
    if not rows:
        pytest.skip("the extension has no symbols")
    assert sum(mine[n] for n in rows) <= 1.05 * sum(built_in[n] for n in rows)
