"""Where the cases of ``cases.py`` run: parity, the interpreter, ``make test``, ``make test-all``.

Triton's interpreter takes milliseconds per tile, and with every loss it would take most of the
suite's time. What it runs (``interpreted`` for parity, ``representatives`` for all else) follows
from what the code shares; a compiled backend, a GPU's included, runs everything:

- Autograd, compilation, masks and reductions are the work of the operator and of a driver, not of
  a policy: one loss for every driver and kind of threshold. The operator is also one for all
  backends, so its forms are crossed with losses on a compiled one.
- A policy's parameters are crossed with the cases that reach all of it: cosines of every kind and
  exactly +-1, weights known in the backward pass only.
- Losses and cases are crossed in two lines, not in a rectangle: one loss of each driver takes every
  case, and every other loss the cases of ``FORMS``, one for each form of a formula that a driver
  evaluates. What goes wrong for a loss and a case together is in the driver or in the formula.
- Half precision is a matter of GEMMs and conversions: a driver's.
- Sizes beyond a few tiles (``heavy``) are left out, and others are cut to three blocks
  (``small``): a GPU's and the CPU's are larger than the interpreter's.

Of that, ``make test`` takes one loss of each topology where the operator is tested and, for parity,
the losses of ``representatives`` in the cases that move labels and thresholds. On a compiled
backend it takes ``representatives``, and for parity every other loss in the cases of ``FORMS``. The
mark ``extended`` leaves the rest to ``make test-all``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from support.cases import (
    ALL_VARIANTS,
    CASES,
    INTERPRETED_VARIANTS,
    THRESHOLDS,
    Case,
    Values,
    variants,
)
from support.helpers import Target

from unitsface_kernels.losses import REGISTRY, LossSpec

#: Cases for a formula: cosines of every kind and exactly +-1, each place of a row among its
#: columns, labels that are ignored, weights known in the backward pass only.
FORMS = {"axes", "columns", "ignored", "none-in-batch", "subset"}


def representatives(specs: Iterable[LossSpec]) -> list[LossSpec]:
    """One loss, the first, for every driver (reduction and topology), kind of threshold and kind of
    variable."""
    found: list[LossSpec] = []
    seen: set[object] = set()
    for spec in specs:
        kinds: set[object] = {(spec.reduction, spec.topology), spec.threshold}
        kinds |= {(v.side, v.given, v.streamed) for v in spec.variables}
        if not kinds <= seen:
            found.append(spec)
            seen |= kinds
    return found


#: Of the registry.
FIRST = representatives(REGISTRY.values())


def extended_if(condition: bool) -> list[pytest.MarkDecorator]:
    """Marks of a parameter that ``make test`` leaves out under this condition."""
    return [pytest.mark.extended] if condition else []


def calls(
    targets: Iterable[Target],
    specs: Iterable[LossSpec] = REGISTRY.values(),
    of_operator: bool = False,
) -> list:
    """Parameters (target, spec) of a test of what losses share: see "Why this grid".

    ``of_operator``: it is about the operator, which is one for all backends and drivers: a loss of
    each topology calls it, on a compiled backend one of each driver in ``make test-all``.
    """
    specs = list(specs)
    drivers = representatives(specs)
    topologies = list({spec.topology: spec for spec in reversed(specs)}.values())
    compiled, slow = (drivers, topologies) if of_operator else (specs, drivers)
    often = topologies if of_operator else drivers
    return [
        pytest.param(
            target,
            spec,
            id=f"{target}-{spec.name}",
            marks=extended_if(spec not in (topologies if target.interpreted else often)),
        )
        for target in targets
        for spec in (slow if target.interpreted else compiled)
    ]


def interpreted(spec: LossSpec, values: Values, case: Case, dtype: torch.dtype) -> bool:
    """Whether a parity problem is worth an interpreter's time."""
    if case.heavy or (values and case.name not in INTERPRETED_VARIANTS):
        return False
    if spec in FIRST:
        return True
    of_thresholds = spec.threshold == "per_column" and case.name in THRESHOLDS
    return dtype == torch.float32 and (case.name in FORMS or of_thresholds)


def small(case: Case) -> Case:
    """A case with as many blocks of 32 or 64 as an interpreter needs to show all of their kinds:
    the first one, one beside it, and one in part, in both directions and along the depth."""
    return replace(
        case,
        rows=min(case.rows, 70),
        columns=None if case.columns is None else min(case.columns, 70),
        dim=min(case.dim, 77),
    )


def compiled_first(spec: LossSpec, values: Values, case: Case, dtype: torch.dtype) -> bool:
    """Whether a compiled parity problem represents the others in ``make test``."""
    if spec in FIRST:
        if values or dtype != torch.float32:
            return case.name in {"axes", "columns", "none-in-batch"}
        # Those of several tiles take seconds each.
        return not case.name.startswith("tiles") or (case.name == "tiles" and spec is FIRST[0])
    return not case.heavy and dtype == torch.float32 and case.name in FORMS


def interpreted_first(spec: LossSpec, values: Values, case: Case, dtype: torch.dtype) -> bool:
    """Whether an interpreted parity problem represents the others in ``make test``."""
    return (
        not values
        and spec in FIRST
        and case.name in (THRESHOLDS if dtype == torch.float32 else {"columns", "none-in-batch"})
    )


def parity_cases() -> list[tuple[str, LossSpec, Values, Case]]:
    """Every (id, loss, parameters, case) in float32."""
    found = []
    for spec in REGISTRY.values():
        for name, values in variants(spec).items():
            for case in CASES:
                if case.applies(spec) and (name == "default" or case.name in ALL_VARIANTS):
                    found.append((f"{spec.name}-{name}-{case.name}", spec, values, case))
    return found
