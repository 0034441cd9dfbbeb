"""A policy as text: formula, derivatives, constants, kernels."""

from __future__ import annotations

from .cpp import cpp_struct
from .derive import derivative
from .describe import describe, described
from .expression import Expression, FormulaError, leaf, topological
from .form import kernel_form
from .formula import COSINE, COSINES, SUMS, THRESHOLD, Formula, default_params
from .text import infix
from .triton_source import triton_module


def shown(formula: Formula) -> str:
    parts = {
        "Formula": describe(formula),
        "Derivatives": described(_derivatives(formula)),
        "Constants at the default parameters": _constants(formula),
    }
    for language, generated in (("C++", _cpp), ("Triton", triton_module)):
        try:
            parts[language] = generated(formula).splitlines()
        except FormulaError:
            parts[language] = ["none: the formula reads variables"]
        if formula.triplet is not None:
            parts[language] = ["none: the search for the nearest columns does not depend on it"]
    return "\n\n".join(
        "\n".join([title, "-" * len(title), *lines]) for title, lines in parts.items()
    )


def _cpp(formula: Formula) -> str:
    return cpp_struct(formula, formula.name)


def _derivatives(formula: Formula) -> dict[str, Expression]:
    variables = [leaf(variable.name, variable.kind) for variable in formula.variables]
    found = {}
    of_rows = {"finish": SUMS, "triplet": COSINES}
    for side in ("positive", "negative", *of_rows):
        value = getattr(formula, side)
        if value is None:
            continue
        for by in of_rows.get(side, (COSINE, THRESHOLD, *variables)):
            if by is COSINE or any(e is by for e in topological(value)):
                found[f"d {side} / d {by!r}"] = derivative(value, by)
    return found


def _constants(formula: Formula) -> list[str]:
    form = kernel_form(formula)
    values = form.constants(default_params(formula))
    return [f"{infix(e)} = {value:g}" for e, value in zip(form.uniforms, values, strict=True)]
