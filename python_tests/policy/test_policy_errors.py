"""What cannot become a kernel is an error at the definition that names the line."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from unitsface_kernels import policy
from unitsface_kernels.policy import FormulaError

Method = Callable[[Any, Any], Any]


def _define(negative: Method, **body: Any) -> type[policy.Policy]:
    annotations = {"margin": policy.Number, "kind": policy.Number, "b": policy.Threshold}
    fields = {
        "__annotations__": annotations,
        "margin": 0.4,
        "kind": policy.number("soft", choices=("soft", "hard")),
        "negative": negative,
    }
    return type("Wrong", (policy.Pair,), fields | body)


def _branch(self: Any, c: Any) -> Any:
    if c > self.margin:
        return c
    return 0.0  # not reached


def _chain(self: Any, c: Any) -> Any:
    inside = 0.0 < c < self.margin
    return policy.where(inside, c, 0.0)


def _builtin_max(self: Any, c: Any) -> Any:
    return max(c - self.margin, 0.0)


def _mathematics(self: Any, c: Any) -> Any:
    return math.exp(c)


def _numpy(self: Any, c: Any) -> Any:
    return np.exp(c)


def _torch(self: Any, c: Any) -> Any:
    return torch.exp(c)


def _tensor(self: Any, c: Any) -> Any:
    return c * torch.tensor(2.0)


def _remainder(self: Any, c: Any) -> Any:
    return c % self.margin


def _unknown_field(self: Any, c: Any) -> Any:
    return c * self.scale


def _missing_function(self: Any, c: Any) -> Any:
    return policy.erf(c)  # type: ignore[attr-defined]


def _word(self: Any, c: Any) -> Any:
    return policy.where(self.kind == "medium", c, 0.0)


def _word_of_a_number(self: Any, c: Any) -> Any:
    return policy.where(self.margin == "soft", c, 0.0)


def _mask_plus_number(self: Any, c: Any) -> Any:
    return (c > self.margin) + 1.0


def _number_as_mask(self: Any, c: Any) -> Any:
    return policy.where(c, 1.0, 0.0)


def _logarithm(self: Any, c: Any) -> Any:
    return policy.log(c)


def _root_of_sibling(self: Any, c: Any) -> Any:
    return policy.where(c > 0.0, policy.sqrt(c), 0.0)


def _division(self: Any, c: Any) -> Any:
    return 1.0 / (c - 0.5)


def _steep(self: Any, c: Any) -> Any:
    return policy.sqrt(1.0 - c)


def _overflow_in_float32(self: Any, c: Any) -> Any:
    return policy.exp(80.0 + c) * policy.exp(60.0)


def _infinite(self: Any, c: Any) -> Any:
    return policy.where(c > self.margin, c, -math.inf)


def _indexed(self: Any, c: Any) -> Any:
    return c[0]


def _helper(self: Any, c: Any) -> Any:
    return 1.0 + _inner(c)


def _inner(c: Any) -> Any:
    return policy.log(c - 2.0)


WRONG: list[tuple[Method, str, str]] = [
    (_branch, "if c > self.margin", "policy.where"),
    (_chain, "0.0 < c < self.margin", "policy.where"),
    (_builtin_max, "max(c - self.margin, 0.0)", "policy.where"),
    (_mathematics, "math.exp(c)", "policy's functions"),
    (_numpy, "np.exp(c)", "policy's functions"),
    (_torch, "torch.exp(c)", "policy's functions"),
    (_tensor, "c * torch.tensor(2.0)", "torch"),
    (_remainder, "c % self.margin", "unsupported operand"),
    (_unknown_field, "c * self.scale", "scale"),
    (_missing_function, "policy.erf(c)", "erf"),
    (_word, 'self.kind == "medium"', "'soft', 'hard'"),
    (_word_of_a_number, 'self.margin == "soft"', "a number"),
    (_mask_plus_number, "(c > self.margin) + 1.0", "must be a number, got a mask"),
    (_number_as_mask, "policy.where(c, 1.0, 0.0)", "must be a mask, got a number"),
    (_logarithm, "policy.log(c)", "cosine -1 "),
    (_root_of_sibling, "policy.sqrt(c)", "other argument"),
    (_division, "1.0 / (c - 0.5)", "cosine 0.5 "),
    (_steep, "policy.sqrt(1.0 - c)", "derivative of negative by cosine is not finite at cosine 1 "),
    (_overflow_in_float32, "policy.exp(80.0 + c) * policy.exp(60.0)", "float32"),
    (_infinite, "policy.where(c > self.margin, c, -math.inf)", "-inf"),
    (_indexed, "c[0]", "policy's functions"),
    (_helper, "policy.log(c - 2.0)", "not finite"),
]


@pytest.mark.parametrize(("method", "line", "says"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_an_error_names_the_line(method: Method, line: str, says: str) -> None:
    with pytest.raises(FormulaError) as error:
        _define(method)
    message = str(error.value)
    assert says in message
    first = message.splitlines()[0]
    assert first.startswith(f"{__file__}:"), message
    assert line in first
    # And the number is that of the line.
    number = int(first[len(__file__) + 1 :].split(":")[0])
    assert line in inspect.getsource(inspect.getmodule(_define)).splitlines()[number - 1]  # type: ignore[arg-type]


def _returns(value: Any) -> Method:
    def negative(self: Any, c: Any) -> Any:
        return value(c) if callable(value) else value

    return negative


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "returns nothing"),
        ((lambda c: (c, c)), "got tuple"),
        ("c", "got str"),
        ((lambda c: c > 0.5), "got a mask; use policy.where"),
        (torch.tensor(1.0), "got Tensor"),
        ([1.0], "got list"),
    ],
)
def test_a_wrong_result_names_the_method(value: Any, says: str) -> None:
    with pytest.raises(FormulaError, match="def negative") as error:
        _define(_returns(value))
    assert says in str(error.value)
    assert "Wrong.negative" in str(error.value)


def test_a_logit_of_minus_infinity_leaves_its_pair_out() -> None:
    formula = _define(_infinite, combine="logsumexp").formula
    assert formula.negative is not None
    with pytest.raises(FormulaError, match="not finite"):
        _define(lambda self, c: policy.where(c > 0.5, c, math.inf), combine="logsumexp")


def test_two_formulas_with_one_node_name_their_own_lines() -> None:
    """Equal expressions are one object, wherever they were written."""

    def first(self: Any, c: Any) -> Any:
        return policy.exp(c) - 5.0

    def second(self: Any, c: Any) -> Any:
        x = policy.exp(c) - 5.0  # the same node
        return policy.log(x)

    kept = _define(first)
    with pytest.raises(FormulaError, match=r"policy\.log\(x\)"):
        _define(second)

    def third(self: Any, c: Any) -> Any:
        return policy.log(policy.exp(c) - 5.0)  # here

    with pytest.raises(FormulaError, match="# here"):
        _define(third)
    assert kept.formula.negative is not None


def _identity(self: Any, c: Any) -> Any:
    return c


def _finish_of_a_field(self: Any, positives: Any, negatives: Any) -> Any:
    return self.positives * negatives


@pytest.mark.parametrize(
    ("base", "body", "says"),
    [
        (policy.Pair, {"combine": "softmax"}, "combine must be one of 'sum', 'softplus', "),
        (policy.Class, {"combine": "logsumexp"}, "combines by 'logsumexp' and has no positive"),
        (
            policy.Pair,
            {"combine": "logsumexp", "positive": _identity, "negative": None},
            "combines by 'logsumexp' and has no negative",
        ),
        (
            policy.Pair,
            # A field with the name of an argument is not the argument.
            {
                "combine": "logsumexps",
                "finish": _finish_of_a_field,
                "__annotations__": {"positives": policy.PerColumn},
            },
            "finish may read its arguments, numbers, scalars and what is one per row alone, not",
        ),
        (
            policy.Pair,
            {
                "combine": "logsumexp",
                "negative": lambda self, c: c - self.b,
                "__annotations__": {"b": policy.Threshold},
            },
            "combines by 'logsumexp', whose logits have no policy.Threshold",
        ),
        (
            policy.Pair,
            {"values": 1.0, "__annotations__": {"values": policy.Number}},
            "values is a name that every policy has",
        ),
    ],
)
def test_a_policy_without_kernels_is_an_error(
    base: type[policy.Policy], body: dict[str, Any], says: str
) -> None:
    with pytest.raises(FormulaError, match=says):
        type("Wrong", (base,), {"negative": _identity} | body)


def test_a_word_is_compared_with_words() -> None:
    with pytest.raises(FormulaError, match="kind is compared with 2, but it is 'soft', 'hard'"):
        _define(lambda self, c: policy.where(self.kind == 2, c, -c))


def test_a_weight_may_read_the_norm_of_the_row() -> None:
    formula = type("Weighted", (policy.Class,), {
        "combine": "softplus", "positive": _identity, "negative": _identity,
        "positive_weight": lambda self: self.row_norm,
    }).formula  # fmt: skip
    assert [variable.name for variable in formula.variables] == ["row_norm"]


def test_numbers_have_defaults_and_names() -> None:
    with pytest.raises(FormulaError, match="margin has no default"):
        type("Bare", (policy.Pair,), {
            "__annotations__": {"margin": policy.Number},
            "negative": lambda self, c: c,
        })  # fmt: skip
    made = _define(lambda self, c: c - self.margin)
    with pytest.raises(TypeError, match="takes margin, kind, got scale"):
        made(scale=3.0)


@pytest.mark.parametrize("name", ["b", "labels"])
def test_names_that_variables_cannot_have(name: str) -> None:
    annotations = {name: policy.Scalar}
    with pytest.raises(FormulaError, match=f"Wrong.{name} is a name that variables cannot have"):
        _define(lambda self, c: c, __annotations__=annotations)


def test_a_number_of_numpy_is_a_number() -> None:
    formula = _define(lambda self, c: np.float32(2.0) * c + np.float64(1.0)).formula
    assert repr(formula.negative) == "2 * cosine + 1"
    mask = _define(lambda self, c: policy.where(np.float64(0.5) > c, c, -c)).formula
    assert repr(mask.negative) == "where(cosine < 0.5, cosine, -cosine)"


@pytest.mark.parametrize("name", ["negativ", "negatives", "positive_weights", "finnish"])
def test_a_misspelled_method_is_named(name: str) -> None:
    with pytest.raises(FormulaError, match=rf"Wrong\.{name} is never called; is \w+ meant\?"):
        _define(lambda self, c: c, **{name: lambda self, c: c})


def test_helper_methods_have_other_names() -> None:
    helpers = {"hinge": _identity, "_negative": _identity}
    made = _define(lambda self, c: self.hinge(c) + self._negative(c), **helpers)
    assert repr(made.formula.negative) == "cosine + cosine"


def test_methods_of_tensors_are_answered_with_the_vocabulary() -> None:
    with pytest.raises(FormulaError, match=r"no attribute 'clamp'; .* policy's functions"):
        _define(lambda self, c: c.clamp(min=0))


def test_a_constant_of_the_class_is_no_number() -> None:
    made = _define(lambda self, c: c - self.shift, shift=0.3)
    with pytest.raises(TypeError, match=r"got shift; is shift annotated as a policy\.Number\?"):
        made(shift=0.2)
