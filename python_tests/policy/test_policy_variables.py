"""Tensors that a formula reads: scalars, per row, per column, per identity, and computed ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support.cases import Case, build
from support.evaluation import check_against_reference
from support.helpers import Target, patched_blocks
from support.policies import CustomProblem
from support.ranks import IDENTITIES, identities, normal, own_rows, run_ranks
from support.tolerances import EXACT, SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor
from torch import distributed as dist

from unitsface_kernels import ClassLoss, PartialFC, dispatch, policy
from unitsface_kernels.functional.call import Options, Samples, class_loss, pair_call
from unitsface_kernels.functional.custom import fused_class_loss, fused_pair_loss
from unitsface_kernels.functional.ranks import pair_loss
from unitsface_kernels.losses import custom
from unitsface_kernels.optim import SampledSGD

NATIVE = Target("native", "cpu")

needs_native = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)


class Everything(policy.Pair):
    """A variable of every kind, and a threshold."""

    combine = "softplus"
    scale: policy.Number = policy.number(6.0, above=0.0)
    b: policy.Threshold
    of_column: policy.PerColumn
    of_identity: policy.PerIdentity
    of_row: policy.PerRow
    factor: policy.Scalar

    def positive(self, c):
        return self.scale * self.factor * (c - self.of_row) * self.of_column - self.b

    def negative(self, c):
        return self.scale * c * self.of_row * self.of_identity + self.factor * self.b


class OneRow(policy.Pair):
    """Terms of a row's variable alone, without a threshold."""

    margin: policy.PerRow

    def positive(self, c):
        return policy.square(1 - c + self.margin)

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class OneColumn(policy.Pair):
    weight: policy.PerColumn

    def positive(self, c):
        return self.weight * (1 - c)

    def negative(self, c):
        return self.weight * policy.exp(c)


class OneScalar(policy.Class):
    combine = "softplus"
    scale: policy.Scalar
    b: policy.Threshold

    def positive(self, c):
        return self.scale * c - self.b

    def negative(self, c):
        return self.scale * c - self.b


class Norms(policy.Class):
    """Terms that read the row's norm and its target's cosine."""

    combine = "softplus"
    of_class: policy.PerIdentity

    def positive(self, c):
        return 6 * c * self.of_class - policy.log(self.row_norm)

    def negative(self, c):
        return 6 * c * policy.where(c > self.target_cosine, 0.2 * self.row_norm, 0.7)


class NormPairs(policy.Pair):
    def positive(self, c):
        return 1 - c * policy.log(self.row_norm)

    def negative(self, c):
        return policy.softplus(4 * c - policy.sqrt(self.row_norm))


class Margins(policy.Class):
    """Targets alone read variables: margins by the norm, and a scale per class."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    margin: policy.PerRow
    of_class: policy.PerColumn
    slope: policy.Scalar

    def positive(self, c):
        turned = policy.cosine_margin(c, 1.0, self.margin + self.slope * self.row_norm)
        return self.scale * self.of_class * turned

    def negative(self, c):
        return self.scale * c


class Curricular(policy.Class):
    """Negatives that read variables too, against the target's cosine."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    easy: policy.PerRow
    t: policy.Scalar

    def positive(self, c):
        return self.scale * (c - 0.1 * self.easy)

    def negative(self, c):
        hard = c > self.target_cosine
        return self.scale * policy.where(hard, c * (self.t + c), c * self.easy)


POLICIES = (Everything, OneRow, OneColumn, OneScalar, Norms, NormPairs, Margins, Curricular)
each_policy = pytest.mark.parametrize("of", POLICIES, ids=lambda of: of.__name__)


@dataclass
class VariableProblem(CustomProblem):
    """A problem with values of variables, which are leaves like the features."""

    variables: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["variables"][name]
        except KeyError:
            raise AttributeError(name) from None

    def loss(self, backend: str, **changes: Any) -> Tensor:
        changed = {name: changes.pop(name) for name in self.variables if name in changes}
        p = replace(self, **changes)
        values, variables = {**p.spec.defaults(), **p.values}, {**p.variables, **changed}
        options = Options(p.reduction, backend, 0.0, variables)
        if p.spec.topology == "class":
            tensors = (p.rows, p.columns, p.labels, p.b, p.index)
            return class_loss(p.spec, values, *tensors, p.reduction, backend, 0.0, variables)
        samples = Samples(p.rows, p.labels, p.b, p.columns, p.column_labels, None)
        return pair_loss(p.spec, values, samples, options, None, "auto")

    def converted(self, dtype: torch.dtype) -> VariableProblem:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        variables = {name: value.detach().to(kind) for name, value in self.variables.items()}
        return replace(super().converted(dtype), variables=variables)  # type: ignore[return-value]

    def leaves(self) -> dict[str, Tensor]:
        own = {name: value.detach().requires_grad_() for name, value in self.variables.items()}
        return super().leaves() | own


def make(
    of: type[policy.Policy], case: Case, dtype: torch.dtype = torch.float32
) -> VariableProblem:
    spec = custom.spec(of())
    p = build(case, spec, {}, dtype)
    generator = torch.Generator().manual_seed(77)
    columns = len(p.rows if p.columns is None else p.columns)
    identities = columns if spec.topology == "class" else max(2, case.rows // 3)
    sizes = {"scalar": 1, "row": case.rows, "column": columns, "identity": identities}
    variables = {
        v.name: 0.3 + torch.rand(sizes[v.kind], generator=generator)
        for v in spec.variables
        if v.given
    }
    return VariableProblem(
        **{**vars(p), "b": None if p.b is None else torch.tensor(0.5)}, variables=variables
    )


CASES = (
    Case("base"),
    Case("memory", rows=9, columns=10, labels="ignored", topology="pair"),
    Case("ignored", rows=9, labels="ignored"),
    Case("none", rows=9, labels="ignored", reduction="none"),
    Case("sum", rows=33, columns=40, reduction="sum"),
    Case("subset", rows=7, columns=21, subset=True, topology="class"),
    Case("no-column-gradient", rows=9, columns=12, column_gradient=False),
    Case("none-no-column-gradient", rows=9, columns=12, column_gradient=False, reduction="none"),
    Case("one-row", rows=1, columns=5),
    Case("no-rows", rows=0, columns=5),
    Case("all-ignored", labels="all ignored"),
    Case("lone-row", rows=1, topology="pair"),
    Case("tiles", rows=1100, dim=33, labels="ignored", topology="pair", heavy=True),
    Case("tiles-columns", rows=40, columns=1700, dim=33, labels="ignored", heavy=True),
    Case("tiles-none", rows=1030, dim=33, reduction="none", topology="pair", heavy=True),
)


def _grid() -> list:
    found = []
    for of in POLICIES:
        for case in CASES:
            if case.applies(custom.spec(of())):
                found.append(pytest.param(of, case, torch.float32, id=f"{of.__name__}-{case.name}"))
        found.append(pytest.param(of, CASES[2], torch.bfloat16, id=f"{of.__name__}-bfloat16"))
    return found


@needs_native
@pytest.mark.parametrize(("of", "case", "dtype"), _grid())
def test_parity(of: type[policy.Policy], case: Case, dtype: torch.dtype) -> None:
    check_against_reference(NATIVE, make(of, case, dtype), dtype)


@needs_native
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_policy
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=lambda case: case.name)
def test_parity_without_a_compiler(
    of: type[policy.Policy], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tiles in operations of Torch."""
    if not case.applies(custom.spec(of())):
        pytest.skip("a case of another topology")
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    check_against_reference(NATIVE, make(of, case), torch.float32)


@each_policy
def test_gradients_of_the_reference(of: type[policy.Policy]) -> None:
    """Against central differences, in float64."""
    p = make(
        of,
        Case(
            "ad hoc", rows=6, dim=5, columns=7 if of.topology == "class" else None, labels="ignored"
        ),
    ).converted(torch.float64)
    leaves = p.leaves()

    def loss(*values: Tensor) -> Tensor:
        return p.loss("reference", **dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@needs_native
@each_policy
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_values_without_a_gradient(of: type[policy.Policy], backend: str) -> None:
    """The other gradients are the same whether variables have one or not."""
    p = make(of, Case("ad hoc", rows=9, columns=10, labels="ignored"))
    _, all_of_them = p.evaluate(backend)
    rows = p.rows.clone().requires_grad_()
    p.loss(backend, rows=rows).backward(p.upstream)
    torch.testing.assert_close(rows.grad, all_of_them["rows"])
    for name in p.variables:
        alone = p.variables[name].clone().requires_grad_()
        p.loss(backend, **{name: alone}).backward(p.upstream)
        torch.testing.assert_close(alone.grad, all_of_them[name])


@needs_native
@each_policy
def test_a_retained_graph_and_numbers(of: type[policy.Policy]) -> None:
    p = make(of, Case("ad hoc", rows=9, columns=10))
    leaves = p.leaves()
    loss = p.loss("native", **leaves)
    loss.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[name])
    numbers = dict.fromkeys(p.variables, 0.5)
    halves = {name: torch.full_like(value, 0.5) for name, value in p.variables.items()}
    torch.testing.assert_close(p.loss("native", **numbers), p.loss("native", **halves))


@needs_native
@pytest.mark.parametrize("of", [Everything, Curricular], ids=lambda of: of.__name__)
def test_compiled(of: type[policy.Policy]) -> None:
    p = make(of, Case("ad hoc", rows=9, columns=10))
    _, eager = p.evaluate("native")
    leaves = p.leaves()
    compiled = torch.compile(lambda given: p.loss("native", **given), backend="aot_eager")
    compiled(leaves).backward(p.upstream)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[name])


@needs_native
@pytest.mark.parametrize("backend", ["reference", "native"])
@each_policy
def test_what_is_not_finite(of: type[policy.Policy], backend: str) -> None:
    """A scalar or column makes all losses NaN, a row its own; of ignored samples nothing counts."""
    p = make(of, Case("ad hoc", rows=9, columns=10, labels="ignored", reduction="none"))
    plain, live = p.loss(backend), p.labels != -1
    for variable in p.spec.variables:
        if not variable.given:
            continue
        value = p.variables[variable.name].clone()
        if variable.kind == "row":
            value[0] = torch.nan  # ignored
            torch.testing.assert_close(p.loss(backend, **{variable.name: value}), plain)
            leaf = value.requires_grad_()
            p.loss(backend, **{variable.name: leaf}).sum().backward()
            assert bool(leaf.grad.isfinite().all())
            value = value.detach().clone()
            value[1] = torch.inf
            bad = torch.arange(9) == 1
        else:
            value[0] = torch.inf
            bad = live
        loss = p.loss(backend, **{variable.name: value})
        assert bool(loss[bad].isnan().all()), variable
        if variable.kind == "row" and p.columns is not None:
            torch.testing.assert_close(loss[~bad], plain[~bad])


def test_errors() -> None:
    rows, labels = torch.randn(5, 4), torch.tensor([0, 1, 0, 2, -1])
    given = {
        "of_row": torch.rand(5),
        "of_column": torch.rand(5),
        "of_identity": torch.rand(3),
        "factor": torch.ones(()),
    }

    def run(**changes: Any) -> None:
        fused_pair_loss(
            Everything(), rows, labels, b=0.0, backend="reference", **{**given, **changes}
        )

    run()
    for name, value, text in (
        ("of_row", torch.rand(4), r"of_row must have shape \(5,\), one per row"),
        ("of_column", torch.rand(5, 1), r"of_column must have shape \(5,\), one per column"),
        ("of_identity", torch.rand(2), r"labels must be in \[-1, 2\)"),
        ("of_identity", torch.rand(3, 1), r"of_identity must have shape \(K,\), one per identity"),
        ("factor", torch.ones(2), "factor must have one element"),
        ("factor", torch.ones((), device="meta"), "factor must be on the device of feats"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**{name: value})
    with pytest.raises(TypeError, match="floating dtype"):
        run(of_row=torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="got one for other"):
        run(other=torch.rand(5))
    spec = custom.spec(Everything())
    samples = Samples(rows, labels, 0.0, None, None, None)
    with pytest.raises(TypeError, match=r"takes variables factor, of_row, .*, got none"):
        pair_call(spec, spec.defaults(), samples, Options("mean", "reference"))


def test_names_that_every_policy_has() -> None:
    with pytest.raises(policy.FormulaError, match="target_cosine is that of a row's class"):

        class OfPairs(policy.Pair):
            def negative(self, c):
                return c - self.target_cosine

    with pytest.raises(policy.FormulaError, match="row_norm is a name that every policy has"):

        class Own(policy.Class):
            row_norm: policy.PerRow

            def negative(self, c):
                return c * self.row_norm


@needs_native
def test_what_kernels_do_not_support_names_the_remedy() -> None:
    class Learned(policy.Class):
        combine = "logsumexp"
        of_class: policy.PerColumn

        def positive(self, c):
            return c

        def negative(self, c):
            return c * self.of_class

    rows, weight, labels = torch.randn(5, 4), torch.randn(6, 4), torch.arange(5)
    values = torch.rand(6)
    losses = [
        fused_class_loss(Learned(), rows, weight, labels, backend=backend, of_class=values)
        for backend in ("native", "reference")
    ]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match=r"gradients of of_class.*use backend=.reference."):
        fused_class_loss(
            Learned(), rows, weight, labels, backend="native", of_class=values.requires_grad_()
        )

    class Softmax(policy.Pair):
        combine = "logsumexp"
        scale: policy.Scalar

        def positive(self, c):
            return self.scale * c

        def negative(self, c):
            return self.scale * c

    with pytest.raises(ValueError, match=r"variables \(scale\).*use backend=.reference."):
        fused_pair_loss(Softmax(), rows, labels, backend="native", scale=torch.ones(()))


# --- across ranks ---------------------------------------------------------------------------------


@dataclass
class _AcrossCase:
    of: type[policy.Pair]
    columns: str
    reduction: str
    backend: str
    dtype: torch.dtype

    def evaluate(
        self,
        rows: slice,
        whole: dict[str, Tensor],
        own: set[str],
        samples: tuple[Tensor, Tensor],
        upstream: Tensor,
        **across: Any,
    ) -> list[Tensor]:
        """Loss and gradients of some rows; ``own``: variables that are theirs alone."""
        leaves = {"feats": samples[0][rows].clone().requires_grad_()}
        for name, value in whole.items():
            leaves[name] = (value[rows] if name in own else value).clone().requires_grad_()
        given: dict[str, Any] = {name: leaves[name] for name in whole}
        if self.columns == "memory":
            given["memory"] = normal(13, 11, seed=3, dtype=self.dtype)
            given["memory_labels"] = identities(13, seed=4)
        if self.of is Everything:
            given["b"] = torch.tensor(0.5)
        options = {"backend": self.backend, "reduction": self.reduction, **across}
        loss = fused_pair_loss(self.of(), leaves["feats"], samples[1][rows], **given, **options)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream)]

    def check(self, rank: int, counts: Sequence[int], exchange: str) -> None:
        rows, total, in_batch = own_rows(counts, rank), sum(counts), self.columns == "batch"
        samples = normal(total, 11, seed=1, dtype=self.dtype), identities(total, seed=2)
        wide = torch.promote_types(self.dtype, torch.float32)
        columns = total if in_batch else 13
        sizes = {"scalar": 1, "row": total, "column": columns, "identity": IDENTITIES}
        kinds = {v.name: v.kind for v in self.of.formula.variables if v.given}
        whole = {
            name: 0.5 + normal(sizes[kind], seed=7, dtype=wide).abs()
            for name, kind in kinds.items()
        }
        own = {name for name, k in kinds.items() if k == "row" or (k == "column" and in_batch)}
        upstream, of_all = torch.tensor(1.7, dtype=wide), torch.tensor(1.7, dtype=wide)
        if self.reduction == "none":
            of_all = normal(total, seed=6, dtype=wide)
            upstream = of_all[rows]
        else:
            of_all = of_all * len(counts)
        want_loss, *want = self.evaluate(slice(None), whole, own, samples, of_all)
        across = {"group": dist.group.WORLD, "exchange": exchange}
        loss, *got = self.evaluate(rows, whole, own, samples, upstream, **across)
        allowed = (SAME_LOSS, SAME_GRADIENT)
        if self.dtype == torch.float64:
            allowed = (EXACT, EXACT)
        if self.reduction == "none":
            want_loss = want_loss[rows]
        check_same(f"{self}: loss", loss, want_loss, allowed[0])
        for name, a, b in zip(("feats", *whole), got, want, strict=True):
            # Of what a rank has alone, W times the objective: data parallelism averages it.
            b = b[rows] if name == "feats" or name in own else b / len(counts)
            check_same(f"{self}: {name}", a, b, allowed[1])


def _across(rank: int, counts: Sequence[int], backend: str, dtype: torch.dtype) -> None:
    """Against one process that has all batches."""
    patched_blocks(pytest.MonkeyPatch(), (7, 4))
    for case in itertools.product((Everything, NormPairs), ("batch", "memory"), ("mean", "none")):
        for exchange in ("gather", "ring"):
            _AcrossCase(*case, backend, dtype).check(rank, counts, exchange)


@pytest.mark.parametrize("counts", [(19, 4), (5, 0, 23)], ids=str)
@needs_native
def test_across_ranks(counts: Sequence[int]) -> None:
    run_ranks(len(counts), _across, counts, "native", torch.float32)


def test_across_ranks_by_the_reference() -> None:
    run_ranks(2, _across, (9, 4), "reference", torch.float64)


def _sharded(rank: int, counts: Sequence[int]) -> None:
    """Against one process with all classes; the upstream gradient is the same on every rank."""
    size, own, total = len(counts), own_rows(counts, rank), sum(counts)
    feats = normal(total, 11, seed=1)
    labels = torch.randint(-1, 17, (total,), generator=torch.Generator().manual_seed(2))
    for of, when in itertools.product((OneScalar, Norms, Margins, Curricular), (None, "backward")):
        kinds = {v.name: v.kind for v in of.formula.variables if v.given}
        kept = {
            name: 0.6 if kind == "scalar" else 0.5 + normal(17, seed=8).abs()
            for name, kind in kinds.items()
            if kind != "row"
        }
        whole = ClassLoss(of(), 11, 17, backend="native", **kept)
        shard = PartialFC(of(), 11, 17, backend="native", **kept)
        with torch.no_grad():
            whole.weight.copy_(normal(17, 11, seed=3))
            shard.weight.copy_(whole.weight[shard.shard.start : shard.shard.stop])
        if when is not None:
            shard.fuse(SampledSGD(shard.parameters(), lr=0.5), when)
        rows = {n: 0.3 + normal(total, seed=9).abs() for n, kind in kinds.items() if kind == "row"}
        results = []
        for module, some in ((whole, slice(None)), (shard, own)):
            leaves = {"feats": feats[some].clone().requires_grad_()}
            leaves |= {name: value[some].clone().requires_grad_() for name, value in rows.items()}
            given = {name: leaves[name] for name in rows}
            loss = module(leaves["feats"], labels[some], **given)
            loss.backward()
            results.append((loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
        (want_loss, want), (loss, got) = results
        name = f"{of.__name__} {when}"
        check_same(f"{name}: loss", loss, want_loss, SAME_LOSS)
        for each, gradient in got.items():
            check_same(f"{name}: {each}", gradient, want[each][own] * size, SAME_GRADIENT)
        classes = slice(shard.shard.start, shard.shard.stop)
        kept_of = dict(shard.loss.named_parameters())
        for each, parameter in whole.named_parameters():
            mine, gradient = kept_of[each], parameter.grad
            if each == "weight" and when is not None:
                moved = parameter.detach() - 0.5 * gradient
                check_same(f"{name}: {each}", mine.detach(), moved[classes], SAME_GRADIENT)
                continue
            gradient = gradient[classes] if gradient.dim() else gradient
            check_same(f"{name}: {each}", mine.grad.to_dense(), gradient, SAME_GRADIENT)


@needs_native
@pytest.mark.parametrize("counts", [(7,), (9, 0, 4)], ids=str)
def test_sharded_classes(counts: Sequence[int]) -> None:
    run_ranks(len(counts), _sharded, counts)
