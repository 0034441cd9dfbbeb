"""Tensors that a formula reads, on Triton: under the interpreter or on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import Case
from support.evaluation import check_against_reference
from support.fake_device import KINDS, allowed_bytes, check_matmuls, record
from support.grid import extended_if
from support.helpers import TARGETS, Target
from support.variables import (
    POLICIES,
    ROWWISE,
    Balanced,
    Curricular,
    Everything,
    Hardest,
    OneScalar,
    Shifts,
    Tempered,
    make,
)

from unitsface_kernels import fused_class_loss, policy
from unitsface_kernels.losses import custom

TRITON = [target for target in TARGETS if target.backend == "triton"]
if not TRITON:
    pytest.skip("Triton cannot run here", allow_module_level=True)

CASES = (
    Case("base"),
    Case("memory", rows=9, columns=10, labels="ignored", topology="pair"),
    Case("blocks", rows=70, dim=33, labels="ignored", topology="pair"),
    Case("blocks-columns", rows=40, columns=70, dim=33, labels="ignored"),
    Case("none", rows=9, labels="ignored", reduction="none"),
    Case("sum", rows=33, columns=40, reduction="sum"),
    Case("subset", rows=7, columns=21, subset=True, topology="class"),
    Case("no-column-gradient", rows=9, columns=12, column_gradient=False),
    Case("none-no-column-gradient", rows=9, columns=12, column_gradient=False, reduction="none"),
    Case("one-row", rows=1, columns=5),
    Case("no-rows", rows=0, columns=5),
    Case("all-ignored", labels="all ignored"),
    Case("lone-row", rows=1, topology="pair"),
)
#: In every run: sums, classes, pairs of one and of two log-sum-exps, with a variable of every kind.
SHORT = {
    Everything: ("blocks", "memory", "none"),
    Curricular: ("blocks-columns", "subset"),
    Tempered: ("blocks", "memory"),
    Balanced: ("blocks", "memory"),
    Shifts: ("blocks-columns",),
}


def _in_short(of: type[policy.Policy], case: Case, dtype: torch.dtype) -> bool:
    if dtype == torch.float16:
        # Slopes that are products of variables.
        return of is Hardest
    return case.name in SHORT.get(of, ())


def _is_rest(case: Case, dtype: torch.dtype) -> bool:
    """Whether a case of a policy is not in every run."""
    return dtype == torch.float16 or case.name in ("memory", "none", "subset")


def _grid() -> list:
    return [
        pytest.param(
            *(target, of, case, dtype),
            id=f"{target}-{of.__name__}-{case.name}-{str(dtype).split('.')[1]}",
            marks=extended_if(not _in_short(of, case, dtype)),
        )
        for target in TRITON
        for of in (*POLICIES, *ROWWISE)
        for case in CASES
        if case.applies(custom.spec(of()))
        for dtype in (torch.float32, torch.float16)
        if dtype == torch.float32 or case.name.startswith("blocks")
        if not target.interpreted or of in SHORT or _is_rest(case, dtype)
    ]


@pytest.mark.parametrize(("target", "of", "case", "dtype"), _grid())
def test_parity(target: Target, of: type[policy.Policy], case: Case, dtype: torch.dtype) -> None:
    check_against_reference(target, make(of, case, dtype), dtype)


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("reduction", [pytest.param("mean", marks=pytest.mark.extended), "none"])
def test_thresholds_per_identity(target: Target, reduction: str) -> None:
    """They differ in the two directions of a pair, as variables do."""
    p = make(Everything, Case("ad hoc", rows=40, labels="ignored", reduction=reduction))
    b = torch.linspace(-0.5, 0.5, int(p.labels.max()) + 1)
    p = replace(p, spec=custom.per_column(p.spec), b=b)
    check_against_reference(target, p, torch.float32)


class Functions(policy.Pair):
    """Functions of a single number, of rows and of columns, before any cosine."""

    factor: policy.Scalar
    of_row: policy.PerRow
    of_column: policy.PerColumn

    def positive(self, c):
        return policy.tanh(self.factor) * policy.softplus(c) + policy.log(self.of_row)

    def negative(self, c):
        rising = policy.sqrt(self.of_column) * policy.cosine_margin(c, 1.0, self.factor)
        return rising + policy.pow(self.factor, self.of_row) * policy.sigmoid(self.of_column)


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_functions_of_variables(target: Target) -> None:
    check_against_reference(target, make(Functions, Case("ad hoc", rows=33)), torch.float32)


@pytest.mark.parametrize(
    ("of", "kind", "dtype"),
    [
        (Everything, "in-batch", torch.bfloat16),
        # Factors of gradients.
        (Hardest, "in-batch", torch.float16),
        (Everything, "memory with gradient", torch.bfloat16),
        pytest.param(OneScalar, "classes", torch.float16, marks=pytest.mark.extended),
        (Curricular, "classes", torch.bfloat16),
        pytest.param(Curricular, "class subset", torch.bfloat16, marks=pytest.mark.extended),
    ],
)
def test_on_a_device_nothing_waits(of: type[policy.Policy], kind: str, dtype: torch.dtype) -> None:
    def problem(case: Case, spec: object, values: object, dtype: torch.dtype, device: str) -> Any:
        p = make(of, case, dtype)
        on = {name: getattr(p, name) for name in ("rows", "labels", "columns", "column_labels")}
        on |= {"index": p.index, "upstream": p.upstream, "b": p.b}
        on = {name: None if value is None else value.to(device) for name, value in on.items()}
        variables = {name: value.to(device) for name, value in p.variables.items()}
        return replace(p, **on, variables=variables)

    found = record(custom.spec(of()), KINDS[kind], dtype, "triton", make=problem)
    check_matmuls(found.tape)
    assert found.tape.waits() == []
    assert found.tape.extra_bytes <= allowed_bytes(found.problem)


class _Signed(policy.Class):
    """Logits that may fall with the cosine."""

    combine = "logsumexp"
    scale: policy.Number = 3.0

    def positive(self, c):
        return self.scale * c

    negative = positive


class _SignedScalar(_Signed):
    scale: policy.Scalar


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_logits_may_fall_with_the_cosine(target: Target, scale: float) -> None:
    """The target and what is past the end of a block stay left out."""
    generator = torch.Generator().manual_seed(0)
    feats, weight = (torch.randn(n, 8, generator=generator) for n in (4, 5))
    labels = torch.tensor([0, 1, 4, -1])
    number = torch.tensor(scale, requires_grad=True)
    found = []
    for backend, device in ((target.backend, target.device), ("reference", "cpu")):
        call = [tensor.to(device) for tensor in (feats, weight, labels)]
        given = number.to(device)
        of_scalar = fused_class_loss(_SignedScalar(), *call, scale=given, backend=backend)
        of_number = fused_class_loss(_Signed(scale=scale), *call, backend=backend)
        (gradient,) = torch.autograd.grad(of_scalar, number)
        found.append(torch.stack([of_scalar.detach(), of_number, gradient]).cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
