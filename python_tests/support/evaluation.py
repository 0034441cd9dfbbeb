"""A backend's loss and gradients against the float64 reference: the rule of tolerances.py."""

from __future__ import annotations

import torch
from support.cases import Problem
from support.helpers import Target
from support.rounding import Precision, Spread, spreads
from support.tolerances import check_all
from torch import Tensor

from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.native.engine import DTYPE_CODES


def precision(target: Target, dtype: torch.dtype) -> Precision:
    """Precision to which the GEMMs of ``target`` round operands for features of ``dtype``.

    On the CPU the native backend multiplies in float32 whatever the inputs, but for bfloat16 on a
    processor that has instructions for it, and the reference always; others may use tensor cores.
    """
    if target.backend == "native" and target.device == "cpu" and dtype == torch.bfloat16:
        widened = not loader.extension().cpu.has_gemm(DTYPE_CODES[dtype])
    else:
        widened = target.backend == "reference" or target == Target("native", "cpu")
    return Precision(torch.float32 if widened else dtype, truncated=target.interpreted)


def expected(target: Target, problem: Problem, dtype: torch.dtype) -> dict[str, Spread]:
    """ "loss" and the gradients by name, and what rounding may do to them."""
    return _expected(problem, precision(target, dtype))


def expected_of_cuda_kernels(problem: Problem, dtype: torch.dtype) -> dict[str, Spread]:
    """The same of the extension's CUDA kernels, wherever they run: operands keep their dtype."""
    return _expected(problem, Precision(dtype, truncated=False))


def _expected(problem: Problem, rounding: Precision) -> dict[str, Spread]:
    exact = problem.converted(torch.float64)

    def evaluate() -> dict[str, Tensor]:
        loss, gradients = exact.evaluate("reference")
        return {"loss": loss, **gradients}

    dtypes = {name: getattr(problem, name).dtype for name in problem.leaves()}
    return spreads(evaluate, rounding, dtypes)


def check_against_reference(
    target: Target, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Checks loss and gradients and returns them. ``dtype``: of the GEMMs' operands."""
    want = expected(target, problem, dtype)
    assert all(bool(spread.want.isfinite().all()) for spread in want.values())
    loss, gradients = problem.evaluate(target.backend)
    assert loss.dtype == torch.float32
    assert {"loss", *gradients} == want.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == getattr(problem, name).dtype
    check_all({"loss": loss, **gradients}, want)
    return loss, gradients
