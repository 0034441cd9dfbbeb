"""Triton policies, see ``backends/triton/losses/policy.py``."""

from __future__ import annotations

import keyword
import math
from collections.abc import Sequence

from .cpp import LARGEST, shortest
from .describe import describe
from .emit import Dialect, names_of_constants, straight_line
from .expression import Expression, leaf, topological, value_of
from .form import POSITIVE, KernelForm, Slopes, kernel_form
from .formula import COSINE, THRESHOLD, Formula, streamed
from .merge import cost
from .operations import OPERATIONS
from .text import infix

_LOSSES = "unitsface_kernels.backends.triton.losses"

#: Names that a constant cannot have: those of the module, and of the functions it calls.
_WORDS = """
triton tl value dcosine dthreshold cosine threshold positive negative params variables logit term
float row bound ends exp log softplus_and_sigmoid sigmoid_slope tanh sin_cos
sine_of_cosine angle_of_cosine pow_positive cosine_margin
"""
_TAKEN = frozenset([*_WORDS.split(), *keyword.kwlist])


def _literal(value: float | bool) -> str:
    if isinstance(value, bool):
        return str(value)
    if math.isnan(value):
        return 'float("nan")'
    if abs(value) > LARGEST:
        return 'float("inf")' if value > 0.0 else '-float("inf")'
    return shortest(value)


TRITON = Dialect(
    spelling=lambda op: OPERATIONS[op].triton,
    literal=_literal,
    declare=lambda name, text, mask: f"{name} = {text}",
    declare_parts=lambda name, call: f"{name} = {call}",
    part=lambda name, part: f"{name}[{part}]",
    longest=84,
)


def triton_module(formula: Formula) -> str:
    """The text of a module that ends with its ``POLICY``."""
    form = kernel_form(formula)
    if form.kind == "softplus":
        kind, functions, policy = "SumPolicy", [_logit(form)], _sum_policy(form)
    elif form.kind == "sum":
        kind, functions = "SumTermsPolicy", [_term(form)]
        # With variables both directions have terms of their own.
        much = form.term and (formula.variables or cost(*form.term.all()) > _HEAVY_TERM)
        heavy = ", heavy=True" if much else ""
        policy = [f"POLICY = SumTermsPolicy(term{heavy})"]
    else:
        functions = [
            _function(name, "cosine, params", slopes, form)
            for name, slopes in (("negative", form.negative), ("positive", form.positive))
            if slopes is not None and not (name == "positive" and _on_host(formula))
        ]
        kind, policy = _logsumexp_policy(form)
    return module_text(formula, [*functions, policy], [f"from {_LOSSES}.policy import {kind}"])


def module_text(formula: Formula, parts: list[list[str]], imports: Sequence[str] = ()) -> str:
    """A module of functions, each some lines, with what they need; ``imports``: more of them."""
    body = "\n\n\n".join("\n".join(lines) for lines in parts)
    used = sorted({name for name in _MATH if f"{name}(" in body})
    what, *formulas = describe(formula)
    head = [
        f'"""{what}',
        "",
        *formulas,
        '"""',
        "",
        "import triton",
        "import triton.language as tl" + ("" if "tl." in body else _UNUSED),
        "",
        *_imported(used),
        *imports,
    ]
    return "\n".join(head) + f"\n\n\n{body}\n"


def _imported(names: list[str]) -> list[str]:
    """The import statement, as ruff formats it."""
    line = f"from {_LOSSES}.math import {', '.join(names)}"
    if len(line) <= 100 or not names:
        return [line] if names else []
    return [f"from {_LOSSES}.math import (", *(f"    {name}," for name in names), ")"]


_UNUSED = "  # noqa: F401  (the interpreter requires it)"

_MATH = (
    *("exp", "log", "softplus_and_sigmoid", "sigmoid_slope", "tanh", "sin_cos", "sine_of_cosine"),
    *("angle_of_cosine", "pow_positive", "cosine_margin"),
)


def _logit(form: KernelForm) -> list[str]:
    assert form.logit is not None
    return _function("logit", "cosine, threshold, positive, params", form.logit, form)


def _term(form: KernelForm) -> list[str]:
    """Tiles, whatever the formula: the kernel adds all of them up."""
    assert form.term is not None
    return _function("term", "cosine, threshold, positive, params", form.term, form, tiles=True)


def _function(
    name: str, arguments: str, slopes: Slopes, form: KernelForm, tiles: bool = False
) -> list[str]:
    outputs = {"value": slopes.value, "dcosine": slopes.dcosine}
    if tiles:
        outputs["dthreshold"] = slopes.dthreshold
    whole = list(outputs) if tiles else []
    known = {COSINE: "cosine", THRESHOLD: "threshold", POSITIVE: "positive"}
    found = streamed(form.formula)
    for place, (number, variable) in enumerate(found.items()):
        known[leaf(variable.name, variable.kind)] = f"variables[{place}]"
        outputs[f"slope{place}"] = slopes.dvariables[number]
    arguments += ", variables" if found else ""
    return function_lines(name, arguments, outputs, known, form.uniforms, whole)


def function_lines(
    name: str,
    arguments: str,
    outputs: dict[str, Expression],
    known: dict[Expression, str],
    uniforms: tuple[Expression, ...],
    whole: Sequence[str] = (),
) -> list[str]:
    """A function that returns ``outputs``.

    Args:
        name, arguments: of the function, which has ``params`` among them.
        outputs: by the names that their values may have.
        known: text of leaves.
        uniforms: constants in the order of ``params``.
        whole: outputs that are tiles whatever they read.
    """
    names = names_of_constants(uniforms, _TAKEN)
    used = set(topological(*outputs.values(), above=names))
    lines, texts = straight_line(TRITON, outputs, {**names, **known})
    for output in whole:
        if not outputs[output].pairwise:
            texts[output] = f"tl.zeros_like(cosine) + {texts[output]}"
    unpacked = [
        f"{names[e]} = params[{place}]{' != 0.0' if e.mask else ''}"
        + ("" if e.op == "leaf" else f"  # {infix(e)}")
        for place, e in enumerate(uniforms)
        if e in used
    ]
    lines = [*unpacked, *lines, f"return {', '.join(texts.values())}"]
    return ["@triton.jit", f"def {name}({arguments}):", *(f"    {line}" for line in lines)]


def _sum_policy(form: KernelForm) -> list[str]:
    options = ["logit", f"threshold_slope={form.threshold_slope}"]
    lines = []
    if form.weights is not None:
        texts = []
        for weight in form.weights:
            place = [i for i, e in enumerate(form.uniforms) if e is weight]
            texts.append(f"params[{place[0]}]" if place else repr(value_of(weight)))
        lines = [
            "def _weights(params: tuple[float, ...]) -> tuple[float, float]:",
            f"    return {', '.join(texts)}",
            "",
            "",
        ]
        options.append("weights=_weights")
    assert form.logit is not None
    if cost(form.logit.value, form.logit.dcosine) > _HEAVY:
        options.append("heavy=True")
    return [*lines, f"POLICY = SumPolicy({', '.join(options)})"]


#: Logits that cost more than this need more registers than the capped configuration has.
_HEAVY = 24
#: The same of terms: a single exponential takes all of them, and a stack.
_HEAVY_TERM = 10


def _on_host(formula: Formula) -> bool:
    """Whether the target's logit is computed from N numbers, see ``streaming/variables.py``."""
    return formula.topology == "class" and bool(formula.variables)


def _logsumexp_policy(form: KernelForm) -> tuple[str, list[str]]:
    absent = form.positive is None or _on_host(form.formula)
    positive = "positive=None" if absent else "positive"
    if form.formula.topology == "pair":
        kind = "LogsumexpPairsPolicy"
        return kind, [f"POLICY = {kind}(negative, {positive})"]
    linear = ", linear=True" if form.linear else ""
    kind = "LogsumexpPolicy"
    return kind, [f"POLICY = {kind}(negative, {positive}{linear})"]
