"""Whole losses on every backend, against float64."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, validate
from ...functional import fused_class_loss, fused_pair_loss
from ...losses import custom
from ..definition import Class, Pair, Policy
from ..formula import Formula
from .report import Finding

BACKENDS = ("reference", "native", "eager", "triton")
ROWS, COLUMNS, WIDTH = 41, 13, 24
EPSILON = 2.0**-24
#: Limit, as a multiple of what rounding of the features changes.
ALLOWED = 32.0
#: In units of the last place of the largest number: additions of some thousand terms.
ADDITIONS = 64.0
DRAWS = 4
THRESHOLD = 3.0


@dataclass(frozen=True)
class Problem:
    """One call, in float64.

    Attributes:
        rows: (N, D); labels: (N,) of rows; weight: (C, D) of classes, or None.
        b: threshold, or None.
        variables: by name.
    """

    name: str
    rows: Tensor
    labels: Tensor
    weight: Tensor | None
    b: float | None
    variables: dict[str, Tensor]


# What is compared: the loss of every row, and the gradients of what has some.
Results = dict[str, Tensor]


def check_backends(policy: Policy, backends: Sequence[str] | None) -> list[Finding]:
    for name in backends or ():
        validate.choice("backends", name, BACKENDS)
    spec = custom.spec(policy)
    validate.parameters(spec, policy.values())
    found = []
    problems = list(_problems(policy))
    expected = [_expected(policy, problem) for problem in problems]
    for backend in BACKENDS if backends is None else backends:
        try:
            got = results(policy, problems, backend, _device(backend))
        except Exception as error:  # whatever a backend raises is a finding
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            cannot = isinstance(error, (ValueError, RuntimeError, NotImplementedError))
            # A requested one has to run.
            ran = not cannot or backends is not None
            found.append(Finding("loss and gradients", backend, torch.nan, reason, ran))
            continue
        for problem, want, own in zip(problems, expected, got, strict=True):
            compared = [_compared(problem.name, backend, n, own[n], *want[n]) for n in want]
            found.append(max(compared, key=lambda f: math.inf if math.isnan(f.ratio) else f.ratio))
    return found


def _compared(
    problem: str, backend: str, name: str, got: Tensor, want: Tensor, allowed: Tensor
) -> Finding:
    """Row by row: those of tiny rows are large."""
    error = (got.double().cpu() - want).flatten(1).norm(dim=1)
    ratio = torch.where(error == 0.0, 0.0, error / allowed)
    ratio = torch.where(error.isfinite(), ratio, torch.inf)
    worst = float(ratio.max())
    note = f"{name}, row {int(ratio.argmax())}" if worst > 0.5 else ""
    return Finding(
        f"loss and gradients: {problem}", backend, worst if worst < torch.inf else torch.nan, note
    )


# --- problems -------------------------------------------------------------------------------------


def _problems(policy: Policy) -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    classes = isinstance(policy, Class)
    labels = torch.randint(-1, 5, (ROWS,), generator=generator)
    centers = normal(COLUMNS, WIDTH)
    near = centers[labels.clamp(min=0)] + normal(ROWS, WIDTH)
    weight = centers + normal(COLUMNS, WIDTH) if classes else None
    variables = _variables(policy.formula, normal)
    b = THRESHOLD if policy.formula.threshold else None
    yield Problem("features", near, labels, weight, b, variables)
    extreme, extreme_weight = near.clone(), None if weight is None else weight.clone()
    extreme[0:2] = torch.eye(WIDTH, dtype=torch.float64)[0]  # cosine 1
    extreme[2] = -extreme[0]  # -1
    extreme[3:5] = torch.eye(WIDTH, dtype=torch.float64)[1:3]  # 0
    extreme[5] = 0.0
    extreme[6] *= 1e-20
    # Products of larger rows would leave float32.
    extreme[7] *= 1e18 if policy.formula.normalize else 1e3
    labels = labels.clone()
    labels[:8] = torch.tensor([0, 0, 0, 1, 2, 1, 3, 4])
    if extreme_weight is not None:
        extreme_weight[0] = extreme[0]
        extreme_weight[1] = 0.0
        extreme_weight[2] = -extreme[3]
    yield Problem("extremes", extreme, labels, extreme_weight, b, variables)
    if b is not None:
        for huge in (1e4, -1e4):
            yield Problem(f"threshold {huge:g}", near, labels, weight, huge, variables)


def _variables(formula: Formula, normal: Any) -> dict[str, Tensor]:
    classes = formula.topology == "class"
    sizes = {
        "scalar": (),
        "row": (ROWS,),
        "column": (COLUMNS if classes else ROWS,),
        "identity": (COLUMNS if classes else 5,),
    }
    given = [v for v in formula.variables if v.given]
    return {v.name: 0.3 + 0.1 * normal(*sizes[v.kind]) for v in given}


# --- results --------------------------------------------------------------------------------------


def _expected(policy: Policy, problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Results in float64, and what each row of them may err by."""
    exact = _run(policy, problem, "reference", torch.float64, "cpu")
    generator = torch.Generator().manual_seed(1)
    effect = {name: torch.zeros(len(value)).double() for name, value in exact.items()}
    for _ in range(DRAWS):

        def rounded(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
            return x * (1.0 + EPSILON * signs)

        rows, weight = rounded(problem.rows), rounded(problem.weight)
        assert rows is not None
        moved = Problem("", rows, problem.labels, weight, problem.b, problem.variables)
        other = _run(policy, moved, "reference", torch.float64, "cpu")
        for name, value in exact.items():
            change = (other[name] - value).flatten(1).norm(dim=1)
            effect[name] = torch.maximum(effect[name], change)
    return {name: (value, _allowed(value, effect[name])) for name, value in exact.items()}


def _allowed(value: Tensor, effect: Tensor) -> Tensor:
    size = value.flatten(1).norm(dim=1)
    # What a row's neighbors show, too: a single draw may happen to have no effect on one.
    usual = (effect / size.clamp_min(1e-300)).median()
    rounding = ADDITIONS * EPSILON * size
    return ALLOWED * torch.maximum(effect, usual * size) + rounding + 1e-7 * size.median() + 1e-30


def _run(
    policy: Policy, problem: Problem, backend: str, dtype: torch.dtype, device: str
) -> Results:
    """Losses of the rows, and gradients, as matrices with a row for each of theirs."""

    def leaf(x: Tensor) -> Tensor:
        return x.to(device, dtype).requires_grad_()

    rows, labels = leaf(problem.rows), problem.labels.to(device)
    leaves = {"gradient of features": rows}
    variables = {name: leaf(value) for name, value in problem.variables.items()}
    leaves |= {f"gradient of {name}": value for name, value in variables.items()}
    arguments: dict[str, Any] = {"backend": backend, "reduction": "none", **variables}
    if problem.b is not None:
        arguments["b"] = leaves["gradient of b"] = leaf(torch.tensor(problem.b))
    if problem.weight is None:
        assert isinstance(policy, Pair)
        loss = fused_pair_loss(policy, rows, labels, **arguments)
    else:
        assert isinstance(policy, Class)
        weight = leaves["gradient of weight"] = leaf(problem.weight)
        loss = fused_class_loss(policy, rows, weight, labels, **arguments)
    upstream = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=device)
    gradients = torch.autograd.grad(loss, [*leaves.values()], upstream)
    found = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {
        name: value.cpu().reshape(len(value) if value.dim() else 1, -1)
        for name, value in found.items()
    }


def results(
    policy: Policy, problems: Sequence[Problem], backend: str, device: str
) -> list[Results]:
    """Losses and gradients of every problem, computed in float32.

    Raises:
        ValueError, RuntimeError, NotImplementedError: the backend cannot run here.
    """
    if backend == "triton" and device == "cpu" and _compiled_triton():
        return _interpreted(policy, problems)
    with warnings.catch_warnings(), _compiler("off" if backend == "eager" else None):
        warnings.simplefilter("ignore")  # that there is no compiler
        name = "native" if backend == "eager" else backend
        return [_run(policy, problem, name, torch.float32, device) for problem in problems]


def _device(backend: str) -> str:
    """Device on which a backend is compared; native kernels of policies are CPU kernels."""
    return "cuda" if torch.cuda.is_available() and backend != "native" else "cpu"


def _compiled_triton() -> bool:
    """Whether Triton's kernels would run on a device only."""
    return dispatch.unavailable("triton", "cpu", torch.float32) is not None


@contextmanager
def _compiler(setting: str | None) -> Iterator[None]:
    name = "UNITSFACE_POLICY_COMPILER"
    before = os.environ.get(name)
    if setting is not None:
        os.environ[name] = setting
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif setting is not None:
            del os.environ[name]


# --- Triton's interpreter -------------------------------------------------------------------------


def _interpreted(policy: Policy, problems: Sequence[Problem]) -> list[Results]:
    """Results of a separate process: Triton decides at its import whether it interprets."""
    sent = pickle.dumps((policy.topology, policy.formula, policy.values(), list(problems)))
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.interpreted"],
        input=sent,
        capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return pickle.loads(done.stdout)


def rebuilt(topology: str, formula: Formula, values: dict[str, Any]) -> Policy:
    """A policy of a formula alone, whose class need not be importable."""
    base: type[Policy] = Class if topology == "class" else Pair
    return type(formula.name, (base,), {"formula": formula})(**values)
