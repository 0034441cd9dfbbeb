"""Triton modules of random formulas, on tiles under the interpreter or on a device."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from support.formulas import (
    PARAMS,
    Rounding,
    bindings,
    choose_by,
    close,
    cosines,
    policy_of,
    tree,
    without_threshold,
)
from support.triton_tiles import DEVICE
from torch import Tensor

from unitsface_kernels import policy as language
from unitsface_kernels.backends.triton.losses import policy as kinds
from unitsface_kernels.policy.derive import derivative
from unitsface_kernels.policy.expression import Expression
from unitsface_kernels.policy.form import kernel_form, term_of
from unitsface_kernels.policy.formula import COSINE, THRESHOLD, Formula
from unitsface_kernels.policy.triton_source import triton_module

THRESHOLD_VALUE = 0.6
SIZE = 64


@triton.jit
def _logits(cosine, value, dcosine, params, LOGIT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    z, slope = LOGIT(tl.load(cosine + i), params)
    tl.store(value + i, z)
    tl.store(dcosine + i, tl.zeros((SIZE,), tl.float32) + slope)


@triton.jit
def _signed(
    cosine, labels, threshold, value, dcosine, params, LOGIT: tl.constexpr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    positive = tl.load(labels + i) == 1
    z, slope = LOGIT(tl.load(cosine + i), tl.load(threshold), positive, params)
    tl.store(value + i, tl.zeros((SIZE,), tl.float32) + z)
    tl.store(dcosine + i, tl.zeros((SIZE,), tl.float32) + slope)


@triton.jit
def _terms(
    cosine, labels, threshold, value, dcosine, dthreshold, params,
    TERM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, SIZE)
    positive = tl.load(labels + i) == 1
    term, slope, by_threshold = TERM(tl.load(cosine + i), tl.load(threshold), positive, params)
    tl.store(value + i, term)
    tl.store(dcosine + i, slope)
    # Tiles, whatever the formula: kernels add them up.
    tl.store(dthreshold + i, tl.reshape(by_threshold, (SIZE,)))


def _module(formula: Formula, folder: Path, name: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(triton_module(formula))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(policy: object, params: tuple[float, ...], side: str) -> list[Tensor]:
    """Value and derivatives; of a "softplus" loss the logit and its derivative."""
    cosine = torch.zeros(SIZE, device=DEVICE)
    cosine[:61] = cosines().float()
    labels = torch.full((SIZE,), int(side == "positive"), device=DEVICE, dtype=torch.int32)
    threshold = torch.full((1,), THRESHOLD_VALUE, device=DEVICE)
    outputs = [torch.empty(SIZE, device=DEVICE) for _ in range(3)]
    if isinstance(policy, kinds.SumPolicy):
        _signed[(1,)](cosine, labels, threshold, *outputs[:2], params, policy.logit, SIZE)
        outputs = outputs[:2]
    elif isinstance(policy, kinds.SumTermsPolicy):
        _terms[(1,)](cosine, labels, threshold, *outputs, params, policy.term, SIZE)
    else:
        _logits[(1,)](cosine, *outputs[:2], params, getattr(policy, side), SIZE)
        outputs = outputs[:2]
    return [output[:61].cpu() for output in outputs]


def _wanted(policy: object, formula: Formula, side: str) -> list[Expression]:
    if isinstance(policy, kinds.SumTermsPolicy):
        value = term_of(formula, side == "positive")
        return [value, derivative(value, COSINE), derivative(value, THRESHOLD)]
    value = getattr(formula, side)
    return [value, derivative(value, COSINE)]


@pytest.mark.parametrize("combine", ["sum", "softplus", "logsumexp"])
@pytest.mark.parametrize("seed", range(8))
def test_modules_compute_their_formulas(combine: str, seed: int, tmp_path: Path) -> None:
    choose = choose_by(random.Random(100 + seed))
    topology = "pair" if seed % 2 else "class"
    sides = [tree(choose, 3) for _ in range(2)]
    if combine != "sum":
        sides = [without_threshold(side) for side in sides]
    if combine == "softplus":
        sides = [("add", side, ("leaf", "threshold")) for side in sides]
    formula = policy_of(*sides, combine, topology).formula
    form = kernel_form(formula)
    policy = _module(formula, tmp_path, f"drawn_{combine}_{seed}").POLICY
    for params in PARAMS:
        for side in ("positive", "negative"):
            wanted = _wanted(policy, formula, side)
            rounding = Rounding(wanted, bindings(formula, params, cosines(), THRESHOLD_VALUE))
            for got, want in zip(_run(policy, form.constants(params), side), wanted, strict=True):
                agrees = close(got, rounding, want).expand(61)
                assert bool(agrees.all()), (
                    f"{side} {params} at {cosines()[~agrees][:3]}: {got[~agrees][:3]} instead of "
                    f"{rounding.values[want].expand(61)[~agrees][:3]}\n{triton_module(formula)}"
                )
        if isinstance(policy, kinds.SumPolicy):
            weights = [float(str(w)) if w.op == "const" else None for w in formula.weights]
            assert weights == list(policy.weights(form.constants(params)))
            assert policy.threshold_slope == 1.0


def test_constants_beyond_float32_are_infinite(tmp_path: Path) -> None:
    class LeftOut(language.Pair):
        combine = "logsumexp"

        def negative(self, c):
            return language.where(c > 0.9, -1e39, c)

    policy = _module(LeftOut.formula, tmp_path, "left_out").POLICY
    value, slope = _run(policy, (), "negative")
    left_out = cosines() > 0.9
    assert bool((value[left_out] == -torch.inf).all())
    assert bool((slope[left_out] == 0.0).all())
    torch.testing.assert_close(value[~left_out], cosines().float()[~left_out])
