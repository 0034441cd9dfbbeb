"""C++ policy structs, see ``csrc/include/unitsface/policy.h``."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from itertools import groupby

from .describe import describe
from .emit import Dialect, names_of_constants, straight_line
from .expression import Expression, leaf
from .form import POSITIVE, KernelForm, Slopes, kernel_form
from .formula import COSINE, THRESHOLD, Formula
from .formula import streamed as streamed_of
from .operations import OPERATIONS
from .text import infix
from .variable import SIDES, Variable

#: Names that a constant cannot have: those of the struct, of scalar_math.h, and words of C++.
_WORDS = """
p v value dcosine dthreshold cosine threshold positive negative evaluate logit weight Term Logit
Softplus kRowThresholds kThresholdSlope kWeighted kUniformSlope
unitsface UF_HOST_DEVICE UF_ISA kParameters kPositives all_bits choose exp_clamped log_positive
WithSlopes Values kScalars kRows kColumns
softplus tanh_bounded sin_cos sine_of_cosine angle_of_cosine pow_positive cosine_margin sqrtf fabsf
INFINITY NAN alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl
concept const const_cast consteval constexpr constinit continue co_await co_return co_yield decltype
default delete do double dynamic_cast else enum explicit export extern false float for friend
goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq
private protected public register reinterpret_cast requires return short signed sizeof static
static_assert static_cast struct switch template this thread_local throw true try typedef typeid
typename union unsigned using virtual void volatile wchar_t while xor xor_eq
"""
_TAKEN = frozenset(_WORDS.split())

#: Finite number of float32.
LARGEST = 3.4028234663852886e38

#: Length of a line within a struct.
_WIDTH = 98


def shortest(value: float) -> str:
    """The shortest decimal number that is ``value`` in float32."""
    (single,) = struct.unpack("f", struct.pack("f", value))
    for digits in range(1, 10):
        text = f"{single:.{digits}g}"
        if struct.pack("f", float(text)) == struct.pack("f", single):
            break
    return text if any(sign in text for sign in ".en") else f"{text}.0"


def _literal(value: float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if math.isnan(value):
        return "NAN"
    if abs(value) > LARGEST:
        return "INFINITY" if value > 0.0 else "-INFINITY"
    return f"{shortest(value)}f"


CPP = Dialect(
    spelling=lambda op: OPERATIONS[op].cpp,
    literal=_literal,
    declare=lambda name, text, mask: f"const {'bool' if mask else 'float'} {name} = {text};",
    declare_parts=lambda name, call: f"const auto {name} = {call};",
    part=lambda name, part: f"{name}.{part}",
    uniform=("({0} != 0u)", "choose({0}, {1}, {2})"),
    # GCC makes a branch of a comparison of what was itself selected, and does not vectorize it.
    compared={
        "where": "choose(all_bits({0}), {1}, {2})",
        "max": "choose(all_bits({0} < {1}), {1}, {0})",
        "min": "choose(all_bits({0} > {1}), {1}, {0})",
    },
)


def cpp_struct(formula: Formula, struct_name: str) -> str:
    """The policy of a formula, to be put into ``namespace unitsface``, where ``UF_ISA`` is inline,
    after ``policy.h`` and ``scalar_math.h``."""
    form = kernel_form(formula)
    names = names_of_constants(form.uniforms, _TAKEN | {struct_name})
    head = [*(f"// {line}" for line in describe(formula)), f"struct {struct_name} {{"]
    lines = _fields(form, struct_name, names)
    for function in _functions(form, names):
        lines += ["", *function]
    indented = (f"  {line}" if line else "" for line in lines)
    return "\n".join([*head, *indented, "};", ""])


def _fields(form: KernelForm, struct_name: str, names: Mapping[Expression, str]) -> list[str]:
    lines = [f"static constexpr int kParameters = {len(names)};"]
    if form.kind == "logsumexps" or (form.kind == "logsumexp" and form.formula.topology == "pair"):
        positives = "true" if form.positive is not None else "false"
        lines.append(f"static constexpr bool kPositives = {positives};")
    if form.term is not None:
        rows = form.formula.threshold and form.formula.topology == "pair"
        lines.append(f"static constexpr bool kRowThresholds = {'true' if rows else 'false'};")
    if form.logit is not None:
        lines.append(f"static constexpr float kThresholdSlope = {_literal(form.threshold_slope)};")
        weighted = "false" if form.weights is None else "true"
        lines.append(f"static constexpr bool kWeighted = {weighted};")
        shared = "true" if form.logit.dcosine.uniform else "false"
        lines.append(f"static constexpr bool kUniformSlope = {shared};")
    streamed = streamed_of(form.formula).values()
    if streamed:
        counts = (f"k{side.title()}s = {_count(streamed, side)}" for side in SIDES)
        lines.append(f"static constexpr int {', '.join(counts)};")
        lines.append(f"// v: {', '.join(variable.name for variable in streamed)}.")
    lines += _declarations(names)
    if not names:
        return [*lines, "", f"UF_HOST_DEVICE explicit {struct_name}(const float*) {{}}"]
    values = (f"all_bits(p[{i}] != 0.0f)" if e.mask else f"p[{i}]" for i, e in enumerate(names))
    members = [f"{name}({value})" for name, value in zip(names.values(), values, strict=True)]
    head = f"UF_HOST_DEVICE explicit {struct_name}(const float* p)"
    together = f": {', '.join(members)} {{}}"
    if len(head) + len(together) + 1 <= _WIDTH:
        return [*lines, "", f"{head} {together}"]
    if len(together) + 4 <= _WIDTH:
        return [*lines, "", head, f"    {together}"]
    body = [f"    : {members[0]}", *(f"      {member}" for member in members[1:])]
    return [*lines, "", head, *(f"{line}," for line in body[:-1]), f"{body[-1]} {{}}"]


def _count(variables: Iterable[Variable], side: str) -> int:
    return sum(variable.side == side for variable in variables)


def _declarations(names: Mapping[Expression, str]) -> list[str]:
    """Fields, with what each is; the comments of neighbors are aligned."""
    lines = []
    for described, group in groupby(names.items(), key=lambda item: item[0].op != "leaf"):
        fields = [(f"{'unsigned' if e.mask else 'float'} {name};", infix(e)) for e, name in group]
        width = max(len(field) for field, _ in fields)
        for field, comment in fields:
            lines.append(f"{field:{width}}  // {comment}" if described else field)
    return lines


def _functions(form: KernelForm, names: Mapping[Expression, str]) -> list[list[str]]:
    formula = form.formula
    if form.term is not None:
        arguments = "float cosine, float threshold, bool positive"
        functions = [_function(form, "Term", "evaluate", arguments, form.term, names)]
        if form.logit is not None:
            functions.append(_function(form, "Logit", "logit", arguments, form.logit, names))
        if form.weights is not None:
            functions.append(_weight(form.weights, names))
        return functions
    sides = {"positive": form.positive, "negative": form.negative}
    if formula.variables and formula.topology == "class":
        # The target's logit is differentiated on N numbers, see ``streaming/variables.py``.
        del sides["positive"]
    return [
        _function(form, "Logit", name, "float cosine", slopes, names)
        for name, slopes in sides.items()
        if slopes is not None
    ]


def _weight(weights: tuple[Expression, Expression], names: Mapping[Expression, str]) -> list[str]:
    outputs = dict(zip(("yes", "no"), weights, strict=True))
    _, texts = straight_line(CPP, outputs, names)
    choice = f"positive ? {texts['yes']} : {texts['no']}"
    return [f"UF_HOST_DEVICE float weight(bool positive) const {{ return {choice}; }}"]


def _function(
    form: KernelForm,
    result: str,
    name: str,
    arguments: str,
    slopes: Slopes,
    names: Mapping[Expression, str],
) -> list[str]:
    outputs = {"value": slopes.value, "dcosine": slopes.dcosine}
    if result == "Term":
        outputs["dthreshold"] = slopes.dthreshold
    known = {**names, COSINE: "cosine", THRESHOLD: "threshold", POSITIVE: "positive"}
    streamed = streamed_of(form.formula)
    for place, (variable, slope) in enumerate(zip(streamed.values(), streamed, strict=True)):
        known[leaf(variable.name, variable.kind)] = f"v.value[{place}]"
        outputs[f"slope{place}"] = slopes.dvariables[slope]
    lines, texts = straight_line(CPP, outputs, known)
    found = list(texts.values())
    if streamed:
        result = f"WithSlopes<{result}, {len(streamed)}>"
        arguments += f", const Values<{len(streamed)}>& v"
        plain = len(found) - len(streamed)
        found = [f"{{{', '.join(some)}}}" for some in (found[:plain], found[plain:])]
    lines.append(f"return {{{', '.join(found)}}};")
    for argument in ("cosine", "threshold", "positive", "v"):
        if not any(re.search(rf"\b{argument}\b", line) for line in lines):
            arguments = re.sub(rf"(float|bool|&) {argument}\b", r"\1", arguments)
    head = f"UF_HOST_DEVICE {result} {name}({arguments}) const {{"
    together = f"{head} {' '.join(lines)} }}"
    if len(lines) == 1 and len(together) <= _WIDTH:
        return [together]
    heads = [head]
    if len(head) > _WIDTH:
        # Before the last argument, below the first one.
        before, last = head.rsplit(", ", 1)
        heads = [f"{before},", " " * (head.index("(") + 1) + last]
    return [*heads, *(f"  {line}" for line in lines), "}"]
