"""A policy as people want to read it: formula, derivatives, constants, kernels."""

from __future__ import annotations

from .cpp import cpp_struct
from .derive import derivative
from .describe import describe, described
from .expression import Expression, leaf, topological
from .form import kernel_form
from .formula import COSINE, THRESHOLD, Formula, default_params
from .text import infix
from .triton_source import triton_module


def shown(formula: Formula) -> str:
    parts = {
        "Formula": describe(formula),
        "Derivatives": described(_derivatives(formula)),
        "Constants at the default parameters": _constants(formula),
    }
    if not formula.variables:
        parts["C++"] = cpp_struct(formula, formula.name).splitlines()
        parts["Triton"] = triton_module(formula).splitlines()
    else:
        parts["C++ and Triton"] = ["none: the formula reads variables"]
    return "\n\n".join(
        "\n".join([title, "-" * len(title), *lines]) for title, lines in parts.items()
    )


def _derivatives(formula: Formula) -> dict[str, Expression]:
    variables = [leaf(variable.name, variable.kind) for variable in formula.variables]
    found = {}
    for side in ("positive", "negative"):
        value = getattr(formula, side)
        if value is None:
            continue
        for by in (COSINE, THRESHOLD, *variables):
            if by is COSINE or any(e is by for e in topological(value)):
                found[f"d {side} / d {by!r}"] = derivative(value, by)
    return found


def _constants(formula: Formula) -> list[str]:
    form = kernel_form(formula)
    values = form.constants(default_params(formula))
    return [f"{infix(e)} = {value:g}" for e, value in zip(form.uniforms, values, strict=True)]
