"""The parity cases, one list for every loss of the registry, and the problems they build.

A new loss joins by being registered. ``VARIANTS`` gives it more than its default parameters.

Why this grid: sizes sit on either side of one (1), of a vector (7), of the interpreter's and the
CPU's tiles (129, 1000 to 2500) and are no multiple of anything (48, 100, 513). Everything that
changes masks, signs or magnitudes runs at the smallest size that shows it, because the value of a
pair does not depend on how many there are; sizes, dtypes and parameters are crossed with the
defaults, not with each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.given_variables import draw_variables
from torch import Tensor

import unitsface_kernels
from unitsface_kernels.losses import LossSpec

Values = dict[str, Any]

# Representative parameters of a loss besides its defaults; absent: none.
VARIANTS: dict[str, dict[str, Values]] = {
    "uss": {"no-margin": {"scale": 16.0, "margin": 0.0}},
    "uce": {
        "balanced": {"scale": 16.0, "margin": 0.1, "negative_weight": 0.2, "adaptive_margin": 0.7}
    },
    "sphereface2": {
        "linear": {"t": 1.0, "alpha": 0.5, "margin": 0.2, "margin_gradient": "exact"},
        "exact": {"margin_gradient": "exact", "scale": 10.0},
        "angular": {"margin_type": "A", "margin": 0.5},
        "angular-exact": {
            "margin_type": "A",
            "margin": 1.2,
            "t": 2.0,
            "margin_gradient": "exact",
            "scale": 10.0,
        },
    },
    "pair_softmax": {"no-margin": {"scale": 16.0, "margin": 0.0}},
    "circle": {"wide": {"scale": 20.0, "margin": 0.45}, "none": {"scale": 8.0, "margin": -1.5}},
    "multi_similarity": {"unequal": {"alpha": 18.0, "beta": 6.0, "base": -0.1}},
    "pair_logsumexp": {"filtered": {"scale": 16.0, "lower": -0.6, "upper": 0.5}},
    "margin_softmax": {
        "normface": {"m3": 0.0, "scale": 20.0},
        "arcface": {"m2": 0.5, "m3": 0.0},
        "arcface-detached": {"m2": 0.5, "m3": 0.0, "margin_gradient": "detached"},
        "prototypes": {"m2": 0.5, "m3": 0.0, "adaptive_margin": 0.7},
        "sphereface": {"m1": 1.7, "m3": 0.0, "scale": 30.0},
        "sphereface-two-turns": {"m1": 4.0, "m3": 0.0, "scale": 4.0},
        "combined": {"m1": 1.2, "m2": 0.3, "m3": 0.2},
    },
    "curricularface": {"wide": {"scale": 16.0, "margin": 1.2}},
    "mv_softmax": {
        "arc": {"margin_type": "arc", "scale": 16.0, "margin_at": "all"},
        "fixed": {"weighting": "fixed", "t": 0.4},
    },
    "filtered_margin_softmax": {"filtered": {"interclass_filtering_threshold": 0.2}},
    # Some hinges are active; more nearest columns than there are.
    "contrastive": {"cosines": {"positive_margin": 0.2, "distance": "cosine"}},
    "batch_hard": {
        "several": {"k": 3, "margin": 0.4},
        "soft": {"k": 64, "distance": "euclidean", "hinge": "soft"},
    },
    "proxy_nca": {"softmax": {"denominator": "all"}},
    "npt": {"several": {"margin": 0.3, "k": 3}, "all": {"margin": 0.5, "k": 64, "hinges": "sum"}},
}


#: Losses that take the sine of the target's angle by default.
ANGULAR = {"curricularface"}


def variants(spec: LossSpec) -> dict[str, Values]:
    return {"default": {}, **VARIANTS.get(spec.name, {})}


def detached(spec: LossSpec, values: Values) -> bool:
    """Whether the gradient is by definition not the derivative of the value."""
    known = spec.defaults() | values
    weighted = spec.name == "circle"  # its weights of pairs are constants
    detached_margin = known.get("margin_gradient") == "detached"
    return weighted or detached_margin or bool(known.get("adaptive_margin"))


@dataclass(frozen=True)
class Case:
    """Shape and kind of a problem.

    Attributes:
        columns: classes, or samples of a memory; None: 11 classes, or the batch itself.
        labels: "random"; "one" identity; "distinct" (no positives); "ignored" (every third row
            and memory column is -1); "all ignored"; "wide" (beyond 32 bits); "columns ignored".
        features: "random"; "identical"; "zeros" (some rows and columns are 0); "axes" (unit
            vectors of the axes and their opposites: cosines exactly -1, 0, 1); "short" (norms on
            either side of the smallest that counts).
        norm: factor of all features.
        values: hyper-parameters, where the loss has them.
        threshold_form: "float", "()" or "(1,)", for losses with a scalar threshold.
        subset: classes are sampled by row index.
        heavy: too large for an interpreter.
    """

    name: str
    rows: int = 7
    dim: int = 48
    columns: int | None = None
    labels: str = "random"
    features: str = "random"
    norm: float = 1.0
    values: Values = field(default_factory=dict)
    threshold: float = 5.0
    threshold_form: str = "()"
    reduction: str = "mean"
    label_dtype: torch.dtype = torch.int64
    topology: str = "any"
    subset: bool = False
    column_gradient: bool = True
    strided: bool = False
    heavy: bool = False
    thresholds_only: bool = False

    def applies(self, spec: LossSpec) -> bool:
        if self.thresholds_only and spec.threshold != "scalar":
            return False
        if self.labels == "wide" and spec.threshold == "per_column":
            return False  # identities index the thresholds
        if self.dim == 1 and spec.name in ANGULAR:
            return False  # cosines are exactly 1 in float64 only
        if self.features == "identical" and spec.reduction == "nearest":
            return False  # which of equal columns is the nearest would depend on rounding
        return self.topology in ("any", spec.topology)


CASES = [
    # Sizes.
    Case("one-row", rows=1, columns=5),
    Case("two-rows", rows=2, columns=1),
    Case("base"),
    Case("columns", rows=7, columns=129, dim=100),
    Case("rows", rows=129, dim=48),
    Case("odd-dim", rows=33, columns=40, dim=513),
    Case("dim-one", rows=9, dim=1),
    Case("thousand", rows=1000, dim=48, columns=7, heavy=True),
    Case("tiles", rows=1100, dim=100, heavy=True, topology="pair"),
    Case("tiles-none", rows=1030, heavy=True, reduction="none", labels="ignored"),
    Case("tiles-columns", rows=21, columns=2500, dim=100, heavy=True, labels="ignored"),
    Case("tiles-both", rows=1100, columns=1100, dim=33, heavy=True),
    Case("tiles-subset", rows=40, columns=2600, subset=True, topology="class", heavy=True),
    Case("single-class", columns=1, topology="class"),
    Case("no-rows", rows=0, columns=5),
    Case("no-rows-in-batch", rows=0, topology="pair"),
    Case("lone-row", rows=1, topology="pair"),
    Case("no-columns", columns=0, labels="all ignored"),
    Case("empty-memory", columns=0, topology="pair"),
    Case("empty-subset", columns=0, subset=True, topology="class", labels="all ignored"),
    # Labels.
    Case("one-identity", labels="one"),
    Case("one-identity-memory", labels="one", columns=9, topology="pair"),
    Case("no-positives", labels="distinct", topology="pair"),
    Case("no-positives-memory", labels="distinct", columns=9, topology="pair"),
    Case("ignored", rows=9, labels="ignored"),
    Case("ignored-memory", rows=9, columns=10, labels="ignored"),
    Case("columns-ignored", columns=10, labels="columns ignored", topology="pair"),
    Case("all-ignored", labels="all ignored"),
    Case("all-ignored-none", columns=9, labels="all ignored", reduction="none"),
    Case("wide-labels", labels="wide", topology="pair"),
    Case("wide-labels-memory", labels="wide", columns=9, topology="pair"),
    Case("int32", label_dtype=torch.int32, columns=9, labels="ignored"),
    Case("int16", label_dtype=torch.int16, labels="ignored"),
    Case("uint8", label_dtype=torch.uint8, columns=9, subset=True),
    # Features.
    Case("identical", features="identical"),
    Case("identical-memory", features="identical", columns=9),
    Case("zeros", features="zeros", columns=9),
    Case("zeros-in-batch", features="zeros"),
    Case("axes", features="axes", rows=9, columns=12),
    Case("axes-in-batch", features="axes", rows=9),
    Case("strided", strided=True, columns=9),
    # Parameters and forms.
    Case("scale-one", values={"scale": 1.0}),
    Case("scale-256", values={"scale": 256.0}, columns=9),
    Case("threshold-1000", threshold=1000.0, thresholds_only=True),
    Case("threshold-minus-1000", threshold=-1000.0, thresholds_only=True, columns=9),
    Case("threshold-float", threshold_form="float", thresholds_only=True),
    Case("threshold-vector", threshold_form="(1,)", thresholds_only=True, columns=9),
    Case("sum", reduction="sum", labels="ignored", columns=9),
    Case("none", reduction="none", labels="ignored", columns=9),
    Case("none-in-batch", reduction="none", labels="ignored", rows=9),
    Case("frozen-columns", columns=9, column_gradient=False),
    Case("subset", columns=12, subset=True, topology="class", labels="ignored"),
    Case("subset-none", columns=12, subset=True, topology="class", reduction="none"),
]
# The cases that are also run in half precision and with a loss's other parameters.
HALF = {"columns", "rows", "ignored", "none-in-batch", "axes", "tiles-columns", "subset", "strided"}
ALL_VARIANTS = {"base", "columns", "none", "axes", "tiles-columns", "zeros"}
INTERPRETED_VARIANTS = {"columns", "none", "axes"}
# What moves a threshold per column: its column's label, place, sampling, tile, and none at all.
THRESHOLDS = HALF | {"base", "ignored-memory", "columns-ignored", "empty-memory", "no-rows", "none"}


@dataclass
class Problem:
    """Arguments of one call of a public function, on one device and of one dtype."""

    spec: LossSpec
    rows: Tensor
    labels: Tensor
    columns: Tensor | None
    column_labels: Tensor | None
    index: Tensor | None
    b: float | Tensor | None
    values: Values
    reduction: str
    upstream: Tensor
    column_gradient: bool = True
    variables: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        """A variable is a field, too."""
        try:
            return self.__dict__["variables"][name]
        except KeyError:
            raise AttributeError(name) from None

    def changed(self, **changes: Any) -> Problem:
        """With some fields exchanged, those of variables among them."""
        own = {name: changes.pop(name, value) for name, value in self.variables.items()}
        return replace(self, **{"variables": own, **changes})

    def loss(self, backend: str, **changes: Any) -> Tensor:
        """The public function on these tensors, with some of them exchanged."""
        p = self.changed(**changes)
        function = getattr(unitsface_kernels, p.spec.function)
        options = {**p.values, **p.variables, "reduction": p.reduction, "backend": backend}
        b = () if p.spec.threshold == "none" else (p.b,)
        if p.spec.topology == "pair":
            options |= {"memory": p.columns, "memory_labels": p.column_labels}
            return function(p.rows, p.labels, *b, **options)
        return function(p.rows, p.columns, p.labels, *b, class_index=p.index, **options)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(N, M) positives and negatives of a pair loss."""
        columns = self.labels if self.column_labels is None else self.column_labels
        valid = (self.labels != -1)[:, None] & (columns >= 0)[None, :]
        if self.columns is None:
            valid.fill_diagonal_(False)
        same = self.labels[:, None] == columns[None, :]
        return valid & same, valid & ~same

    def valid_rows(self) -> Tensor:
        """(N,) rows that have a loss."""
        if self.spec.valid_rows == "labeled":
            return self.labels != -1
        positive, negative = (pairs.any(dim=1) for pairs in self.pairs())
        if self.spec.valid_rows == "with_both":
            return positive & negative
        return positive if self.spec.valid_rows == "with_positives" else negative

    def converted(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; thresholds and variables stay float32 with half
        features.
        """
        kind = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(t: Any) -> Any:
            return t.detach().to(dtype) if isinstance(t, Tensor) else t

        b = self.b
        if isinstance(b, Tensor):
            b = b.detach().to(kind)
        variables = {name: value.detach().to(kind) for name, value in self.variables.items()}
        rows, columns = cast(self.rows), cast(self.columns)
        return replace(self, rows=rows, columns=columns, b=b, variables=variables)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of what gets a gradient, by field name; in the layout of the original."""
        found = {"rows": self.rows.detach().requires_grad_()}
        if self.columns is not None and self.column_gradient:
            found["columns"] = self.columns.detach().requires_grad_()
        if isinstance(self.b, Tensor):
            found["b"] = self.b.detach().clone().requires_grad_()
        own = {name: value.detach().requires_grad_() for name, value in self.variables.items()}
        return found | own

    def evaluate(self, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients."""
        leaves = self.leaves()
        loss = self.loss(backend, **leaves)
        loss.backward(self.upstream.to(loss.dtype))
        gradients = {}
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"{name} got no gradient"
            gradients[name] = leaf.grad
        return loss.detach(), gradients


def build(
    case: Case,
    spec: LossSpec,
    variant: Values | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """The problem of a case; the same numbers every time, whatever the device."""
    generator = torch.Generator().manual_seed(1234)
    known = spec.defaults()
    values = {k: v for k, v in ((variant or {}) | case.values).items() if k in known}
    classes = spec.topology == "class"
    count = case.columns if case.columns is not None else (11 if classes else None)
    rows = _features(case, case.rows, generator, first=True)
    columns = None if count is None else _features(case, count, generator, first=False)
    index = None
    targets = count or 0
    if case.subset and classes:
        targets = (targets + 1) // 2
        index = torch.randperm(count or 0, generator=generator)[:targets]
    labels, column_labels = _labels(case, case.rows, count, targets, classes, generator)
    if case.strided:
        rows, labels = _strided(rows), _strided(labels)
        columns = None if columns is None else columns.T.contiguous().T
        column_labels = None if column_labels is None else _strided(column_labels)

    def on(t: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if t is None else t.to(device=device, dtype=kind)

    upstream = torch.tensor(1.7)
    if case.reduction == "none":
        upstream = 0.5 + torch.rand(case.rows, generator=generator)
    return Problem(
        spec=spec,
        rows=rows.to(device=device, dtype=dtype),
        labels=labels.to(device=device, dtype=case.label_dtype),
        columns=on(columns, dtype),
        column_labels=on(column_labels, case.label_dtype),
        index=on(index, torch.int32 if case.label_dtype == torch.int32 else torch.int64),
        b=_threshold(case, spec, count or 0, device),
        values=values,
        reduction=case.reduction,
        upstream=upstream.to(device),
        column_gradient=case.column_gradient,
        variables=draw_variables(
            spec, len(rows), len(rows if columns is None else columns), device
        ),
    )


def problem(spec: LossSpec, device: str = "cpu", **fields: Any) -> Problem:
    """A problem for tests of something other than parity."""
    return build(Case("ad hoc", **fields), spec, device=device)


def _strided(t: Tensor) -> Tensor:
    """The same values with gaps in memory along the last dimension."""
    gaps = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 99, dtype=t.dtype)
    gaps[..., ::2] = t
    return gaps[..., ::2]


def _features(case: Case, count: int, generator: torch.Generator, first: bool) -> Tensor:
    if case.features == "identical":
        pattern = torch.randn(1, case.dim, generator=torch.Generator().manual_seed(5))
        return pattern.repeat(count, 1)
    if case.features == "axes":
        # Powers of two: exact when divided by their norms, in every dtype.
        found = torch.zeros(count, case.dim)
        for i in range(count):
            found[i, (i // 2) % 3] = (-1.0) ** i * 2.0 ** (i % 4 - 1)
        return found
    found = torch.randn(count, case.dim, generator=generator)
    # Samples of one source have something in common: cosines are not all near 0.
    found = found + 0.5 * torch.randn(1, case.dim, generator=torch.Generator().manual_seed(7))
    if case.features == "zeros":
        found[(0 if first else 1) :: 4] = 0.0
    if case.features == "short":
        norms = torch.tensor([0.2, 0.95, 1.05, 4.0]).repeat(count // 4 + 1)[:count, None]
        return 1e-5 * norms * torch.nn.functional.normalize(found, dim=1)
    return case.norm * found


def _labels(
    case: Case,
    rows: int,
    count: int | None,
    targets: int,
    classes: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Row labels, and the memory's if there is one."""
    size = 0 if count is None else count
    identities = targets if classes else max(2, rows // 3)

    def draw(n: int) -> Tensor:
        return torch.randint(0, max(identities, 1), (n,), generator=generator)

    labels, other = draw(rows), draw(size)
    if case.labels == "one":
        labels, other = torch.zeros_like(labels), torch.zeros_like(other)
    elif case.labels == "distinct":
        labels, other = torch.arange(rows), rows + torch.arange(size)
    elif case.labels == "ignored":
        labels[::3], other[1::3] = -1, -1
    elif case.labels == "columns ignored":
        other.fill_(-1)
    elif case.labels == "all ignored":
        labels.fill_(-1)
    elif case.labels == "wide":
        # Equal in their low 32 bits and different above, or the other way round.
        labels, other = labels * 2**32 + 5, other * 2**32 + 5
    return labels, None if classes or count is None else other


def _threshold(case: Case, spec: LossSpec, columns: int, device: str) -> float | Tensor | None:
    if spec.threshold == "none":
        return None
    if spec.threshold == "per_column":
        # Identities of samples: more than any case has.
        count = columns if spec.topology == "class" else 512
        return case.threshold + torch.sin(torch.arange(count, device=device, dtype=torch.float32))
    if case.threshold_form == "float":
        return case.threshold
    return torch.full(() if case.threshold_form == "()" else (1,), case.threshold, device=device)
