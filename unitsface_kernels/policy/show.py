"""A policy as text: formula, derivatives, constants, kernels."""

from __future__ import annotations

from collections.abc import Callable

from .cpp import cpp_struct
from .derive import derivative
from .describe import describe, described
from .expression import Expression, topological
from .form import kernel_form
from .formula import (
    COSINE,
    COSINES,
    SUMS,
    THRESHOLD,
    Formula,
    default_params,
    variable_leaves,
)
from .text import infix
from .triton_source import triton_module


def shown(formula: Formula) -> str:
    parts = {
        "Formula": describe(formula),
        "Derivatives": described(_derivatives(formula)),
        "Constants at the default parameters": _constants(formula),
        "C++": _kernels(formula, lambda: cpp_struct(formula, formula.name)),
        "Triton": _kernels(formula, lambda: triton_module(formula)),
    }
    return "\n\n".join(
        "\n".join([title, "-" * len(title), *lines]) for title, lines in parts.items()
    )


def _kernels(formula: Formula, text: Callable[[], str]) -> list[str]:
    if formula.combine == "topk":
        return ["none: the kernel is a search, and the formula runs on k numbers per row"]
    return text().splitlines()


def _derivatives(formula: Formula) -> dict[str, Expression]:
    of_pairs = COSINE, THRESHOLD, *variable_leaves(formula)
    arguments = {"positive": of_pairs, "negative": of_pairs, "finish": SUMS, "triplet": COSINES}
    found = {}
    for name, leaves in arguments.items():
        value = getattr(formula, name)
        if value is None:
            continue
        read = set(topological(value))
        for by in leaves:
            if by is COSINE or by in read:
                found[f"d {name} / d {by!r}"] = derivative(value, by)
    return found


def _constants(formula: Formula) -> list[str]:
    form = kernel_form(formula)
    values = form.constants(default_params(formula))
    return [f"{infix(e)} = {value:g}" for e, value in zip(form.uniforms, values, strict=True)]
