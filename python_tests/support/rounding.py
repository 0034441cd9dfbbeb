"""Monte Carlo arithmetic: what rounding may do to a result. tolerances.py has the derivation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Half a unit in the last place of float32, relative; functions of vector libraries: 2 units.
UNIT = 2.0**-24
FUNCTION_UNITS = 4.0
SAMPLES = 4

# Relative error of a conversion, and the largest absolute one among subnormal numbers.
CONVERSION = {
    torch.float32: (UNIT, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}

_SUMS = {"sum", "mean", "mm", "bmm", "addmm"}
_ACCUMULATIONS = {"index_add", "index_put", "scatter_add"}
# Factor of the relative error of the sum in that of the result, or in the result itself.
_SUMS_WITHIN = {"linalg_vector_norm": 0.5, "logsumexp": 1.0, "_log_softmax": 1.0}
_DIFFERENCES = {"_log_softmax_backward_data"}
_CORRECTLY_ROUNDED = {"add", "sub", "rsub", "mul", "div", "reciprocal", "sqrt", "lerp"}
_CORRECTLY_ROUNDED |= _SUMS | _ACCUMULATIONS
# Composed of several operations: not exact where their result happens to be a float32 number.
_COMPOSED = {"exp", "expm1", "log", "log1p", "sigmoid", "log_sigmoid_forward", "softplus", "tanh"}
_COMPOSED |= {"sigmoid_backward", "log_sigmoid_backward", "softplus_backward", "tanh_backward"}
_COMPOSED |= {"logsumexp", "_log_softmax"} | _DIFFERENCES
_KNOWN = _CORRECTLY_ROUNDED | _COMPOSED | {"pow", "rsqrt", "acos", "cos", "sin"}
_KNOWN |= {"linalg_vector_norm"}

# Signs at random: a slice of them costs nothing.
_SIGNS = torch.randint(2, (2**22,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


@dataclass(frozen=True)
class Precision:
    """Precision to which the operands of GEMMs are rounded.

    Attributes:
        operand: their dtype.
        truncated: bits are cut off in place of rounding to nearest, as Triton's interpreter does
            with bfloat16.
    """

    operand: torch.dtype = torch.float32
    truncated: bool = False


class Rounded(TorchDispatchMode):
    """Every float64 operation, backward passes included, errs as a float32 one may."""

    def __init__(self, seed: int, precision: Precision) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.precision = precision

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator))

    def _signs(self, like: Tensor) -> Tensor:
        """A sign for every number plus one for all, since equal operands round equally."""
        count, pool = like.numel(), _SIGNS.to(like.device)
        if count > len(pool):
            pool = pool.repeat(math.ceil(count / len(pool)))
        start = self._below(len(pool) - count + 1)
        if count == 1:  # the two as one, which cannot cancel
            return 2**0.5 * pool[start : start + 1].view(like.shape)
        return pool[start : start + count].view(like.shape) + (2.0 * self._below(2) - 1.0)

    def converted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` as a conversion to ``dtype`` may leave it."""
        relative, absolute = CONVERSION[dtype]
        error = (relative * x.abs()).clamp_min(absolute)
        if self.precision.truncated and dtype == torch.bfloat16:
            moved = x - x.sign() * error * (1.0 + self._signs(x) / 2.0)
        else:
            moved = x + error * self._signs(x)
        return torch.where(x == x.to(dtype).double(), x, moved)

    def _operand(self, x: Tensor) -> Tensor:
        if self.precision.operand == torch.float32 or not x.numel():
            return x
        # A float16 operand is scaled, by a power of two, so that its largest number is near 1.
        top = torch.exp2(torch.ceil(torch.log2(x.abs().max().clamp_min(1e-300))))
        return self.converted(x / top, self.precision.operand) * top

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name in ("mm", "bmm"):
            args = tuple(self._operand(t) for t in args)
        result = func(*args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if name in _KNOWN and out.dtype == torch.float64 and out.numel():
            single = out.float()
            error = self._error(name, func, args, kwargs, single)
            # A result that float32 can hold is exact; beyond its range anything is accepted.
            exact = single.isinf() if name in _COMPOSED else (single == out) | single.isinf()
            out.add_(error.masked_fill_(exact, 0.0))
        return result

    def _error(self, name: str, func: Any, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        size = out
        units = UNIT if name in _CORRECTLY_ROUNDED else FUNCTION_UNITS * UNIT
        if name in _DIFFERENCES:
            size = out.abs() + args[0].abs().float()
        elif name in ("add", "sub", "rsub"):
            # Numbers such as a margin are rounded too.
            numbers = sum(abs(a) for a in args[:2] if isinstance(a, float))
            size = out.abs() + numbers if numbers else out
        error = size * self._signs(out) * units
        if name in _SUMS or name in _ACCUMULATIONS:
            terms, squares = self._terms(name, func, args, kwargs)
            variance = (terms - 1) * (out.double().square() / 3.0 + squares / 6.0)
            error += UNIT * variance.clamp_(min=0.0).sqrt_() * self._signs(out)
        elif name in _SUMS_WITHIN:
            terms = args[0].numel() / (len(out) if name == "_log_softmax" else out.numel())
            # For positive terms, the sum of squares is at most the square of the sum.
            relative = _SUMS_WITHIN[name] * UNIT * math.sqrt(max(terms - 1.0, 0.0) / 2.0)
            scale = out if name == "linalg_vector_norm" else torch.ones_like(out)
            error += relative * scale * self._signs(out)
        return error

    def _terms(
        self, name: str, func: Any, args: tuple, kwargs: dict
    ) -> tuple[float | Tensor, Tensor]:
        """Number of terms of each sum, and the sum of their squares."""
        if name in ("sum", "mean"):
            squares = func(args[0].square(), *args[1:], **kwargs)
            terms = args[0].numel() / squares.numel()
            return terms, squares / (terms if name == "mean" else 1.0)
        if name in _ACCUMULATIONS:
            at = 2 if name == "index_put" else 3
            zero, source, rest = torch.zeros_like(args[0]), args[at], args[at + 1 :]
            place = args[1:at]
            count = func(zero.clone(), *place, torch.ones_like(source), *rest, **kwargs)
            return count, func(zero, *place, source.square(), *rest, **kwargs)
        a, b = args[-2:]
        return float(a.shape[-1]), a.square() @ b.square()


@dataclass(frozen=True)
class Spread:
    """A result in float64, and root mean squares of what rounding does to it.

    Attributes:
        want: the result.
        norm: of the Euclidean norm of the error.
        element: of its largest element.
    """

    want: Tensor
    norm: float
    element: float


def spreads(
    evaluate: Callable[[], dict[str, Tensor]],
    precision: Precision | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
) -> dict[str, Spread]:
    """Spreads of what ``evaluate`` computes in float64, forward and backward pass.

    Args:
        precision: of GEMMs; None: float32.
        dtypes: of results, by name; absent: float32.
    """
    want = {name: t.detach().double() for name, t in evaluate().items()}
    squares = {name: [0.0, 0.0] for name in want}
    for seed in range(SAMPLES):
        with Rounded(seed, precision or Precision()) as mode:
            found = evaluate()
        for name, t in found.items():
            error = mode.converted(t.detach(), (dtypes or {}).get(name, torch.float32))
            error = (error - want[name])[want[name].isfinite()]
            if error.numel():
                squares[name][0] += float(error.square().sum())
                squares[name][1] += float(error.abs().max()) ** 2
    return {
        name: Spread(t, *(math.sqrt(square / SAMPLES) for square in squares[name]))
        for name, t in want.items()
    }
