"""Formulas of inner products, and variables that follow from columns and labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.grid import extended_if
from support.variables import Distances
from torch import Tensor

from unitsface_kernels import ClassLoss, PartialFC, dispatch, policy
from unitsface_kernels.functional import fused_class_loss, fused_pair_loss, fused_simple_loss
from unitsface_kernels.losses import custom

BACKENDS = [
    name
    for name in ("native", "triton")
    if dispatch.unavailable(name, "cpu", torch.float32) is None
]


class Logistic(policy.Pair):
    normalize = False
    combine = "softplus"
    b: policy.Threshold

    def positive(self, c):
        return 0.5 * c - self.b

    def negative(self, c):
        return 0.5 * c - self.b


class Softmax(policy.Pair):
    normalize = False
    combine = "logsumexp"

    def positive(self, c):
        return c - 0.5

    def negative(self, c):
        return c


class Both(policy.Pair):
    normalize = False
    combine = "logsumexps"

    def positive(self, c):
        return -c

    def negative(self, c):
        return c

    def finish(self, positives, negatives):
        return policy.softplus(positives + negatives)


class Classes(policy.Class):
    normalize = False
    combine = "logsumexp"

    def positive(self, c):
        return c - 0.3

    def negative(self, c):
        return c


class Nearest(policy.Class):
    normalize = False
    combine = "topk"
    k: policy.Number = 2

    def triplet(self, nearest, target):
        return policy.maximum(nearest - target + 0.2, 0)


def _results(of: policy.Policy, backend: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss and gradients; "memory" among the options: against 23 columns with a gradient."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator).bfloat16()
        return drawn.to(torch.float64 if backend == "reference" else dtype).requires_grad_()

    rows, columns = normal(37, 12), normal(23, 12)
    labels = torch.randint(-1, 6, (37,), generator=generator)
    leaves = [rows]
    if of.formula.threshold:
        options["b"] = torch.tensor(0.5, dtype=rows.dtype, requires_grad=True)
        leaves.append(options["b"])
    if of.topology == "class":
        leaves.append(columns)
        loss = fused_class_loss(of, rows, columns, labels, backend=backend, **options)
    else:
        if options.pop("memory", False):
            leaves.append(columns)
            options |= {"memory": columns, "batch_offset": 4}
            options["memory_labels"] = torch.randint(-1, 6, (23,), generator=generator)
        loss = fused_pair_loss(of, rows, labels, backend=backend, **options)
    upstream = torch.linspace(0.3, 1.4, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


def _cases():
    for of in (Logistic, Softmax, Both, Classes, Nearest, Distances):
        for memory in (False, True) if of.topology == "pair" else (False,):
            for reduction in ("mean", "none"):
                for backend in BACKENDS:
                    rare = backend == "triton" or (reduction == "none") == memory
                    rare = rare or of not in (Both, Nearest)
                    name = f"{backend}-{of.__name__}-{reduction}" + ("-memory" if memory else "")
                    options = {"reduction": reduction, **({"memory": True} if memory else {})}
                    marks = extended_if(rare)
                    yield pytest.param(of, backend, options, id=name, marks=marks)


@pytest.mark.parametrize(("of", "backend", "options"), list(_cases()))
def test_backends(of: type[policy.Policy], backend: str, options: dict[str, Any]) -> None:
    want = _results(of(), "reference", torch.float64, **options)
    for one, other in zip(_results(of(), backend, torch.float32, **options), want, strict=True):
        assert (one.double() - other).abs().max() <= 2e-6 * other.abs().max()


@pytest.mark.parametrize("of", [Logistic, Classes])
def test_bfloat16(of: type[policy.Policy]) -> None:
    """Features are exact in bfloat16; gradients are rounded where they are operands."""
    want = _results(of(), "reference", torch.float64)
    loss, *gradients = _results(of(), "native", torch.bfloat16)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=0.0)
    for one, other in zip(gradients, want[1:], strict=True):
        assert (one.double() - other).norm() <= 2.0**-7 * other.norm()


def test_scaled_features_are_another_loss() -> None:
    """Nothing is normalized, and zero rows are as good as any."""
    feats, labels = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
    feats[0], feats[1] = 3.0, 2.0
    loss = fused_pair_loss(Logistic(), feats, labels, b=0.0, reduction="none", backend="native")
    both = math.log1p(math.exp(-0.5 * 18.0)) + 2 * math.log(2.0)
    torch.testing.assert_close(loss, torch.tensor([both, both, 3 * math.log(2.0), 3 * math.log(2)]))


def test_a_row_that_is_not_finite_is_nan() -> None:
    feats, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, -1])
    feats[1, 2] = torch.inf
    loss = fused_pair_loss(Logistic(), feats, labels, b=0.0, reduction="none", backend="native")
    assert loss.isnan().tolist() == [True, True, True, False]


def test_partial_fc() -> None:
    feats, labels = torch.randn(8, 5), torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])
    head = PartialFC(Classes(), 5, 7)
    want = ClassLoss(Classes(), 5, 7)
    want.load_state_dict(head.loss.state_dict())
    one, other = head(feats, labels), want(feats, labels)
    torch.testing.assert_close(one, other)
    one.backward()
    other.backward()
    torch.testing.assert_close(head.loss.weight.grad, want.weight.grad)


def test_operations_on_angles_are_refused() -> None:
    for write in (policy.acos, policy.sine, lambda c: policy.cosine_margin(c, 1.0, 0.5)):
        with pytest.raises(policy.FormulaError, match=r"which is of a cosine; with normalize"):

            class Angles(policy.Class):
                normalize = False

                def positive(self, c, write=write):
                    return write(c)

    with pytest.raises(policy.FormulaError, match="normalize must be True or False, got 1"):

        class One(policy.Pair):
            normalize = 1

            def positive(self, c):
                return c

    with pytest.raises(policy.FormulaError, match="not finite at inner product"):

        class Root(policy.Pair):
            normalize = False

            def positive(self, c):
                return policy.sqrt(2 - c)


class Squares(policy.Pair):
    normalize = False

    def positive(self, c):
        return policy.square(c - 1)


def test_slopes_without_a_bound() -> None:
    assert custom.spec(Logistic()).slope_bound(()) == 0.5
    assert custom.spec(Squares()).slope_bound(()) == math.inf
    feats, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"^skip_tolerance needs a bound of the derivative of Squ"):
        fused_pair_loss(Squares(), feats, labels, skip_tolerance=0.1, backend="native")
    fused_pair_loss(Logistic(), feats, labels, b=0.0, skip_tolerance=0.1, backend="native")
    # Every pair reads norms, so that nothing is left out.
    some = {"reduction": "none", "backend": "native"}
    loss = fused_simple_loss(feats, labels, 0.5, skip_tolerance=0.1, **some)
    assert torch.equal(loss, fused_simple_loss(feats, labels, 0.5, **some))
    if "triton" in BACKENDS:
        with pytest.raises(ValueError, match=r"^float16, in which gradients are scaled, needs"):
            fused_pair_loss(Squares(), feats.half(), labels, backend="triton")


def test_cosines_and_inner_products_are_two_losses() -> None:
    class Cosines(Logistic):
        normalize = True

    assert custom.digest(Cosines.formula) != custom.digest(Logistic.formula)


def test_means_of_pairs() -> None:
    """Terms over the number of such pairs per row, averaged over rows, are averaged over pairs."""

    class Means(policy.Pair):
        def positive(self, c):
            return c / self.positives_per_row

        def negative(self, c):
            return 10 * c / self.negatives_per_row

    feats = torch.nn.functional.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 0, 0, 1, 2, -1, 1])
    valid = (labels >= 0)[:, None] & (labels >= 0) & ~torch.eye(7, dtype=torch.bool)
    same, cosine = labels[:, None] == labels, feats @ feats.T
    want = cosine[valid & same].mean() + 10 * cosine[valid & ~same].mean()
    got = fused_pair_loss(Means(), feats, labels, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got = fused_pair_loss(Means(), feats.float(), labels, backend="native")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("native", marks=pytest.mark.extended)]
)
def test_means_of_pairs_in_both_directions(backend: str) -> None:
    """A pair counts twice, among the losses of rows and among those of columns."""

    class Means(policy.Pair):
        def positive(self, c):
            return c / self.positives_per_row

        def negative(self, c):
            return 10 * c / self.negatives_per_row

    feats, memory = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1) for n in (5, 9))
    labels, of_memory = torch.tensor([0, 1, 2, -1, 2]), torch.tensor([0, 1, 1, 2, 3, 4, 5, -1, 2])
    valid, same = (labels >= 0)[:, None] & (of_memory >= 0), labels[:, None] == of_memory
    cosine = feats @ memory.T
    want = cosine[valid & same].mean() + 10 * cosine[valid & ~same].mean()
    options = {"memory": memory, "memory_labels": of_memory, "both": True, "backend": backend}
    got = fused_pair_loss(Means(), feats, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
