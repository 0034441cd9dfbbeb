"""Functions of a row, or of a tile's variables, in Triton: what is not computed for every pair.

Their modules are made at the first use: see ``backends/triton/losses/rows.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from .derive import derivative
from .expression import Expression, constant
from .form import host_values, uniforms_of
from .formula import COSINE, Formula, variable_leaves
from .intervals import ends, largest_slope
from .triton_source import function_lines, module_text


@dataclass(frozen=True, eq=False)
class Function:
    """A function that kernels call.

    Attributes:
        formula: whose it is.
        name, arguments: of the function; the last one is ``params``, :meth:`constants`.
        outputs: what it returns, in this order.
        known: text of leaves.
    """

    formula: Formula
    name: str
    arguments: str
    outputs: tuple[Expression, ...]
    known: dict[Expression, str]
    _found: dict[tuple[float, ...], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def constants(self, params: tuple[float, ...]) -> tuple[float, ...]:
        """As :meth:`KernelForm.constants`."""
        found = self._found.get(params)
        if found is None:
            if len(self._found) >= 1024:
                self._found.clear()
            uniforms = uniforms_of(*self.outputs)
            found = self._found[params] = host_values(uniforms, self.formula, params)
        return found

    def module(self) -> str:
        """The text of a module that has the function."""
        outputs = {f"slope{place}": e for place, e in enumerate(self.outputs)}
        lines = function_lines(
            self.name, self.arguments, outputs, self.known, uniforms_of(*self.outputs)
        )
        return module_text(self.formula, [lines])


@cache
def row_function(formula: Formula) -> Function:
    """``row(cosine, variables, params)`` of a log-sum-exp over classes, by the target's cosine and
    all variables, those of columns at the target: the target's logit, its derivative by the cosine,
    the regularizer, and the derivatives of logit and regularizer by each variable.
    """
    leaves = variable_leaves(formula)
    logit, term = formula.positive, formula.regularizer
    assert logit is not None
    outputs = [logit, derivative(logit, COSINE), constant(0) if term is None else term]
    outputs += [derivative(logit, by) for by in leaves]
    outputs += [constant(0) if term is None else derivative(term, by) for by in leaves]
    known = {COSINE: "cosine", **{e: f"variables[{i}]" for i, e in enumerate(leaves)}}
    return Function(formula, "row", "cosine, variables, params", tuple(outputs), known)


@cache
def bound_function(formula: Formula) -> Function:
    """``bound(ends, params)``: :func:`largest_slope`, where ``ends`` has the smallest and the
    largest value of each variable that tiles read, and of the threshold behind them.
    """
    known: dict[Expression, str] = {}
    for place, (low, high) in enumerate(ends(formula).values()):
        known |= {high: f"ends[{2 * place + 1}]", low: f"ends[{2 * place}]"}
    return Function(formula, "bound", "ends, params", (largest_slope(formula),), known)
