"""Tensors that a formula reads, on Triton: under the interpreter or on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Case
from support.evaluation import check_against_reference
from support.fake_device import KINDS, allowed_bytes, check_capturable, check_matmuls, record
from support.grid import extended_if
from support.helpers import TARGETS, Target, patched_blocks
from support.variables import POLICIES, Curricular, Everything, OneScalar, make

from unitsface_kernels import policy
from unitsface_kernels.functional.custom import fused_pair_loss
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
#: With a variable of every kind, of pairs and of classes.
SHORT = {"blocks", "blocks-columns", "none", "memory", "subset"}


def _grid() -> list:
    return [
        pytest.param(
            *(target, of, case, dtype),
            id=f"{target}-{of.__name__}-{case.name}-{str(dtype).split('.')[1]}",
            marks=extended_if(
                of not in (Everything, Curricular)
                or case.name not in SHORT
                or dtype != torch.float32
            ),
        )
        for target in TRITON
        for of in POLICIES
        for case in CASES
        if case.applies(custom.spec(of()))
        for dtype in (torch.float32, torch.float16)
        if dtype == torch.float32 or case.name.startswith("blocks")
    ]


@pytest.mark.parametrize(("target", "of", "case", "dtype"), _grid())
def test_parity(target: Target, of: type[policy.Policy], case: Case, dtype: torch.dtype) -> None:
    check_against_reference(target, make(of, case, dtype), dtype)
