"""Users' losses on Triton: generated modules, under the interpreter or on a device."""

from __future__ import annotations

import inspect
import linecache
from pathlib import Path

import pytest
import torch
from support.cases import CASES, Case
from support.evaluation import check_against_reference
from support.fake_device import KINDS, allowed_bytes, check_capturable, check_matmuls, record
from support.grid import FORMS, extended_if
from support.helpers import TARGETS, Target, patched_blocks
from support.policies import DRIVERS, Contrastive, Hard, custom_problem, specs
from support.variables import make

from unitsface_kernels import policy
from unitsface_kernels.losses import LossSpec, custom

TRITON = [target for target in TARGETS if target.backend == "triton"]
if not TRITON:
    pytest.skip("Triton cannot run here", allow_module_level=True)

from unitsface_kernels.backends.triton import losses  # noqa: E402
from unitsface_kernels.backends.triton.losses import SumPolicy, SumTermsPolicy  # noqa: E402
from unitsface_kernels.backends.triton.losses import custom as generated  # noqa: E402

CUSTOM = specs()
#: Every direction, weights known in the backward pass only, thresholds, ignored rows and columns.
SHORT = ("columns", "none", "none-in-batch", "ignored", "ignored-memory", "axes", "subset")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _grid() -> list:
    return [
        pytest.param(
            *(target, spec, case, dtype),
            id=f"{target}-{name}-{case.name}-{str(dtype).split('.')[1]}".replace(" ", "-"),
            marks=extended_if(
                target.interpreted
                and (case.name not in SHORT or "per column" in name or dtype != torch.float32)
            ),
        )
        for target in TRITON
        for name, spec in CUSTOM.items()
        for case in CASES
        if case.applies(spec) and not (target.interpreted and case.heavy)
        for dtype in (torch.float32, torch.float16)
        if dtype == torch.float32 or case.name in ("columns", "none-in-batch")
        if not target.interpreted or name in DRIVERS or case.name in (*SHORT, *FORMS)
    ]


@pytest.mark.parametrize(("target", "spec", "case", "dtype"), _grid())
def test_parity(target: Target, spec: LossSpec, case: Case, dtype: torch.dtype) -> None:
    p = custom_problem(case, spec, {}, dtype, target.device)
    check_against_reference(target, p, dtype)


class OfTargets(policy.Class):
    """Variables of every kind, which the targets' logits alone read."""

    combine = "logsumexp"
    margin: policy.PerIdentity
    of_row: policy.PerRow
    factor: policy.Scalar

    def positive(self, c):
        return 8 * self.factor * (c - self.margin) + self.of_row * policy.tanh(self.row_norm)

    def negative(self, c):
        return 8 * c


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("name", ["base", "ignored", "subset"])
def test_variables_of_targets(target: Target, name: str) -> None:
    case = {
        "base": Case("base"),
        "ignored": Case("ignored", rows=9, labels="ignored"),
        "subset": Case("subset", rows=7, columns=21, subset=True, topology="class"),
    }[name]
    check_against_reference(target, make(OfTargets, case), torch.float32)


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("low", [0.1, 0.99])
def test_negatives_may_be_left_out(
    target: Target, low: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_blocks(monkeypatch, (4, 4))
    p = custom_problem(
        Case("ad hoc", rows=9, dim=8, columns=21),
        custom.spec(Hard()),
        {"low": low},
        torch.float32,
        target.device,
    )
    check_against_reference(target, p, torch.float32)


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_policies_are_of_the_kind_of_their_formula(target: Target) -> None:
    kinds = {"Contrastive": SumTermsPolicy, "Unified": SumPolicy, "Quadratic": SumTermsPolicy}
    for name, kind in kinds.items():
        assert isinstance(losses.policy_of(CUSTOM[name]), kind)
    # A function of its own is more than the capped registers hold.
    assert losses.policy_of(CUSTOM["Quadratic"]).heavy
    assert not losses.policy_of(CUSTOM["Contrastive"]).heavy


# --- modules --------------------------------------------------------------------------------------


class Cubic(policy.Pair):
    """A loss of this file alone."""

    scale: policy.Number = 2.0

    def positive(self, c):
        return self.scale * (1 - c) ** 3

    def negative(self, c):
        return self.scale * (1 + c) ** 3


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> LossSpec:
    """A loss whose module is made anew."""
    monkeypatch.setattr(losses, "_known", {})
    monkeypatch.setattr(generated, "_modules", {})
    return custom.spec(Cubic())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_a_module_is_kept_and_readable(folder: Path, fresh: LossSpec) -> None:
    found = losses.policy_of(fresh)
    assert losses.policy_of(fresh) is found
    (file,) = _files(folder)
    assert "Cubic" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0
    assert file.samefile(found.term.fn.__code__.co_filename)


def test_what_lies_in_the_cache_is_not_executed(folder: Path, fresh: LossSpec) -> None:
    """A changed file: the formula's own text is what runs."""
    losses.policy_of(fresh)
    (file,) = _files(folder)
    text = file.read_text()
    file.write_text("raise SystemExit('executed')\n")
    losses._known.clear()
    generated._modules.clear()
    linecache.checkcache()
    found = losses.policy_of(fresh)
    assert "def term(" in inspect.getsource(found.term.fn)
    assert file.read_text() == text


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_that_cannot_be_used(folder: Path, fresh: LossSpec, mode: int) -> None:
    """Others can write to it, or the user cannot: nothing is written, and the loss works."""
    folder.mkdir()
    folder.chmod(mode)
    p = custom_problem(Case("ad hoc"), fresh, {}, torch.float32, TRITON[0].device)
    check_against_reference(TRITON[0], p, torch.float32)
    folder.chmod(0o700)
    if mode == 0o777:
        assert _files(folder) == []


# --- the path of a device -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize(
    "kind", ["in-batch", "in-batch, none", "memory with gradient", "classes", "class subset"]
)
def test_on_a_device_nothing_waits(name: str, kind: str) -> None:
    if not KINDS[kind].applies(CUSTOM[name]):
        return
    found = record(CUSTOM[name], KINDS[kind], torch.bfloat16, "triton", make=custom_problem)
    check_matmuls(found.tape)
    assert found.tape.waits() == []
    assert found.tape.extra_bytes <= allowed_bytes(found.problem)
    names = {work.name for work in found.tape.of("triton")}
    of_policies = {n for n in names if n.startswith(("sum_", "statistics", "pair_", "gradient"))}
    # A top-k search has no formula.
    assert bool(of_policies) == (CUSTOM[name].triplet is None)
    for work in found.tape.of("triton"):
        if work.name in of_policies:
            functions = [v for v in work.options.values() if hasattr(v, "fn")]
            assert all(f.fn.__module__.startswith(generated.__name__) for f in functions)


def test_a_step_can_be_captured() -> None:
    spec = custom.spec(Contrastive())
    found = record(
        spec, KINDS["in-batch"], torch.bfloat16, "triton", capturing=True, make=custom_problem
    )
    check_capturable(found.tape)
