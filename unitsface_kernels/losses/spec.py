"""The specification of a loss: formula, parameters, topology and reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Literal

from torch import Tensor

from ..policy.form import kernel_form
from ..policy.formula import Formula
from ..policy.parameter import Parameter, Topology
from ..policy.variable import Variable

Reduction = Literal["sum", "logsumexp", "logsumexps", "nearest"]
Threshold = Literal["none", "scalar", "per_column"]
ValidRows = Literal["labeled", "with_positives", "with_negatives", "with_both"]

# positive(cosine, threshold, params) and negative(cosine, threshold, params): elementwise. Those of
# a spec with variables take a fourth argument: their values, which broadcast against the cosines.
EagerTerm = Callable[..., Tensor]


@dataclass(frozen=True)
class Triplet:
    """Formula of a ``nearest`` loss: a row's nearest wrong columns against its target.

    It is evaluated on N x k cosines, not N x M: plain tensor operations serve every backend, and
    there is no policy in C++ or Triton.

    Attributes:
        count: k, how many columns are searched for, from the parameters.
        adds: whether the row's loss is the sum of its terms, not their mean.
        value: eager formula: cosines of the nearest wrong columns (N, k) and of the targets (N, 1)
            to terms (N, k). Of a formula with variables a fourth argument has the scalars, () or
            (1, 1), and those of rows, (N, 1).
        slopes: derivatives of ``value`` by the two and by these variables, each (N, k), for
            backends outside autograd; 0 at a kink, as in autograd.
    """

    count: Callable[[tuple[float, ...]], int]
    adds: Callable[[tuple[float, ...]], bool]
    value: Callable[..., Tensor]
    slopes: Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Finish:
    """A row's loss by the log-sum-exps of its positives' and of its negatives' logits, a function
    of two numbers per row; of classes by the target's logit and the latter.

    Attributes:
        value: eager formula: (N,) of positives, (N,) of negatives to (N,) losses. Of a formula with
            variables a fourth argument has the scalars, () or (1,), and those of rows, (N,).
        slopes: derivatives of ``value`` by the two and by these variables, for backends outside
            autograd.
    """

    value: Callable[..., Tensor]
    slopes: Callable[..., list[Tensor]]


#: The log-sum-exp of nothing, in place of -inf: 0 times it is 0.
EMPTY = -1e30


def scale_bound(params: tuple[float, ...]) -> float:
    """The slope of a loss that multiplies cosines by its first parameter and nothing more."""
    return abs(params[0])


@dataclass(frozen=True)
class LossSpec:
    """A loss as drivers, tests and documentation tables use it.

    Attributes:
        name: registry key; the C++ and the Triton policy carry the same name.
        topology: ``"pair"`` (columns are samples) or ``"class"`` (columns are class weights).
        reduction: how a row's pairs combine. ``"sum"``: the policy's terms are added.
            ``"logsumexp"``: the policy gives logits, and the row's loss is the mean over its
            positives p of ``logsumexp({z_p} and all negatives) - z_p``, or over classes ``finish``,
            if there is one, of the target's logit and the negatives' log-sum-exp. ``"logsumexps"``:
            the policy gives logits, and the row's loss is ``finish`` of two log-sum-exps, of its
            positives and of its negatives. ``"nearest"``: the mean or sum of ``triplet`` over the
            largest cosines that are not the target's.
        threshold: the learnable threshold b: absent, one scalar, or one per column identity.
        parameters: scalar hyper-parameters in the order of :meth:`pack`.
        negative, positive: eager formula; loss terms (``sum``) or logits (``logsumexp(s)``).
            Without ``positive``, positive pairs are left out. None for ``nearest``.
        function: name of the public function.
        source: paper and equation.
        valid_rows: those over which ``reduction="mean"`` averages: all that are not
            ignored, or of these the ones with at least one positive, or one negative, or both.
            The loss of all others is 0.
        slope_bound: bound of |d term / d cosine| (of a row's single positive excepted) for given
            parameters; scales float16 gradients.
        triplet: the formula of a ``nearest`` loss, else None.
        finish: the formula of a ``logsumexps`` loss, or of a ``logsumexp`` loss over classes that
            is not the cross-entropy; else None.
        policy: name of the loss with the same kernels; None: it has its own.
        formula: from which eager terms and kernels are generated; None: they are hand-written.
        tiles: a loss whose kernels run in place of own ones: of a class log-sum-exp whose targets
            alone read variables, and whose negatives' logits are the cosine times the first
            parameter, as those of ``tiles`` are. None: the loss has its own.
        regularizer: eager formula that is added to the loss of every row of a class log-sum-exp; a
            function of the row, not of its pairs. None: there is none.
    """

    name: str
    topology: Topology
    reduction: Reduction
    threshold: Threshold
    parameters: tuple[Parameter, ...]
    negative: EagerTerm | None
    positive: EagerTerm | None
    function: str
    source: str
    valid_rows: ValidRows = "labeled"
    slope_bound: Callable[[tuple[float, ...]], float] = scale_bound
    triplet: Triplet | None = None
    finish: Finish | None = None
    policy: str | None = None
    formula: Formula | None = None
    tiles: LossSpec | None = None
    regularizer: EagerTerm | None = None

    def pack(self, values: Mapping[str, float | str | Tensor]) -> tuple[float, ...]:
        """Hyper-parameters as floats, in order."""
        return tuple(
            [
                float(p.choices.index(str(values[p.name])) if p.choices else values[p.name])
                for p in self.parameters
            ]
        )

    def kernel_params(self, params: tuple[float, ...]) -> tuple[float, ...]:
        """What the kernels receive for packed hyper-parameters: the constants of the formula."""
        if self.tiles is not None:
            others = self.tiles.pack(self.tiles.defaults())[1:]
            return self.tiles.kernel_params((params[0], *others))
        return params if self.formula is None else kernel_form(self.formula).constants(params)

    @cached_property
    def normalize(self) -> bool:
        """Whether pairs are compared by cosines; else by the inner products of the features, which
        "cosine" stands for everywhere then, and "unit" rows are the rows."""
        return self.formula is None or self.formula.normalize

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """Tensors that the formula reads, see :class:`Formula`."""
        return () if self.formula is None else self.formula.variables

    def variables_size(self, rows: int, columns: int) -> int:
        """Elements of all given variables of a call with so many rows and columns."""
        sizes = {"scalar": 1, "row": rows, "column": columns}
        return sum(sizes[variable.side] for variable in self.variables if variable.given)

    def defaults(self) -> dict[str, float | str]:
        return {parameter.name: parameter.default for parameter in self.parameters}

    @property
    def default(self) -> SimpleNamespace:
        """:meth:`defaults` as attributes, for the signatures of the function and the modules."""
        return SimpleNamespace(**self.defaults())
