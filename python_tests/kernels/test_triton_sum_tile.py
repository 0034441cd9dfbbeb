"""Tiles of ``sum`` losses on the Triton engine, one at a time, against float64 and autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.grid import extended_if
from support.triton_tiles import DEVICE, TOLERANCE, make_call, poison, relative
from torch import Tensor

from unitsface_kernels.backends.streaming import Call, SumTile
from unitsface_kernels.backends.triton.engine import TritonEngine

__all__ = ["poison"]


@dataclasses.dataclass
class PairProblem:
    """n rows against m columns of a batch (``diagonal``: its own, ``both``) or a ``memory``.

    ``remote``: columns of another rank, which has the pairs in the other direction; only the
    gradient of the rows has both.
    """

    a: Tensor
    b: Tensor
    a_labels: Tensor
    b_labels: Tensor
    a_threshold: Tensor
    b_threshold: Tensor
    a_weights: Tensor | None
    b_weights: Tensor | None
    kind: str

    def expected(self, call: Call) -> dict[str, Tensor]:
        """In float64, every direction of every pair written out."""
        spec, params = call.spec, call.params
        cosine = (self.a.double() @ self.b.double().T).requires_grad_()
        a_threshold = self.a_threshold.double().requires_grad_()
        b_threshold = self.b_threshold.double().requires_grad_()
        valid = (self.a_labels >= 0)[:, None] & (self.b_labels >= 0)[None, :]
        if self.kind == "diagonal":
            valid &= ~torch.eye(len(self.a), dtype=torch.bool, device=valid.device)
        positive = self.a_labels[:, None] == self.b_labels[None, :]

        def terms(threshold: Tensor) -> Tensor:
            of_positive = spec.positive(cosine, threshold, params)
            of_negative = spec.negative(cosine, threshold, params)
            return torch.where(positive, of_positive, of_negative) * valid

        ones = torch.ones(max(len(self.a), len(self.b)), device=valid.device)
        a_weights = ones[: len(self.a)] if self.a_weights is None else self.a_weights
        b_weights = ones[: len(self.b)] if self.b_weights is None else self.b_weights
        forward, back = terms(b_threshold[None, :]), terms(a_threshold[:, None])
        weighted = (forward * a_weights[:, None]).sum()
        counted = weighted
        if self.kind != "memory":
            weighted = weighted + (back * b_weights[None, :]).sum()
        if self.kind == "both":
            counted = weighted
        gradient = torch.autograd.grad(weighted, cosine, retain_graph=True)[0]
        d_a, d_b = torch.autograd.grad(counted, (a_threshold, b_threshold), materialize_grads=True)
        losses = {"a_loss": forward.sum(1).detach(), "b_loss": back.sum(0).detach()}
        return losses | {"gradient": gradient, "d_a": d_a, "d_b": d_b}


def pair_problem(kind: str, n: int, m: int, dtype: torch.dtype, weighted: bool) -> PairProblem:
    generator = torch.Generator().manual_seed(n * m)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    def labels(count: int) -> Tensor:
        found = torch.randint(0, 5, (count,), generator=generator)
        found[count // 2] = -1
        return found.to(DEVICE)

    a = normal(n, 50).to(dtype)
    a_labels, a_threshold = labels(n), normal(n)
    a_weights = normal(n).abs() / 4 if weighted else None
    if kind == "diagonal":
        b, b_labels, b_threshold, b_weights = a, a_labels, a_threshold, a_weights
    else:
        b, b_labels, b_threshold = normal(m, 50).to(dtype), labels(m), normal(m)
        b_weights = normal(m).abs() / 4 if weighted and kind != "memory" else None
    return PairProblem(
        a, b, a_labels, b_labels, a_threshold, b_threshold, a_weights, b_weights, kind
    )


each_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=extended_if(d != torch.float32)) for d in TOLERANCE], ids=str
)


@each_dtype
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("per_column", [False, True], ids=["scalar", "per_column"])
@pytest.mark.parametrize(
    ("kind", "n", "m"),
    [("diagonal", 70, 70), ("both", 70, 33), ("memory", 45, 101), ("remote", 40, 40)],
)
def test_sum_tile(
    kind: str, n: int, m: int, per_column: bool, weighted: bool, dtype: torch.dtype
) -> None:
    problem = pair_problem(kind, n, m, dtype, weighted)
    if not per_column:
        problem.a_threshold = problem.a_threshold[:1].expand(n)
        problem.b_threshold = problem.a_threshold[:1].expand(m)
    call = make_call("uss", problem.a, problem.b, per_column, scale=8.0)
    engine = TritonEngine(call)
    a, _ = engine.normalize_rows(problem.a, 0, n)
    b = a if kind == "diagonal" else engine.normalize_rows(problem.b, 0, m, reuse=True)[0]
    a_labels, b_labels = engine.prepare_labels(problem.a_labels, problem.b_labels)
    # The position in the whole matrix: of thresholds, and of the diagonal.
    start = m if kind in ("both", "remote") else 0
    a_loss = torch.ones(n, device=DEVICE)
    b_loss = torch.ones(m, device=DEVICE) if kind == "both" else None
    d_threshold = torch.ones(start + max(n, m) if per_column else 1, device=DEVICE)
    size = slice(None) if per_column else slice(1)
    thresholds = [t[size].contiguous() for t in (problem.b_threshold, problem.a_threshold)]
    tile = SumTile(
        *(a, b, a_labels, b_labels, *thresholds, problem.a_weights, problem.b_weights),
        *(a_loss, b_loss, d_threshold),
        a_start=start,
        b_start=0,
        diagonal=None if kind in ("memory", "remote") else start,
        mirrored=kind != "memory",
        gradient=True,
    )
    gradient = engine.sum_tile(tile)
    assert gradient is not None
    assert gradient.dtype == dtype
    # The kernels' own operands, so that only their arithmetic is compared.
    problem.a, problem.b = a, b
    want = problem.expected(call)
    tolerance = TOLERANCE[dtype]
    assert relative(a_loss - 1, want["a_loss"]) < tolerance
    if b_loss is not None:
        assert relative(b_loss - 1, want["b_loss"]) < tolerance
    found = torch.zeros(n, 50, device=DEVICE)
    engine.addmm(found, gradient, b)
    assert relative(found, want["gradient"] @ b.double()) < tolerance
    assert relative(engine.matmul(gradient.T, a), want["gradient"].T @ a.double()) < tolerance
    expected = torch.zeros(d_threshold.shape, dtype=torch.float64, device=DEVICE)
    if per_column:
        expected[start : start + n] += want["d_a"]
        expected[:m] += want["d_b"]
    else:
        expected += want["d_a"].sum() + want["d_b"].sum()
    assert relative(d_threshold - 1, expected) < 2 * tolerance


@each_dtype
@pytest.mark.parametrize(
    ("kind", "n", "m"),
    [("diagonal", 70, 70), ("both", 70, 33), ("memory", 45, 101), ("remote", 40, 40)],
)
@pytest.mark.parametrize(
    ("loss", "values"),
    [
        ("uss", {"scale": 8.0}),
        ("uce", {"scale": 8.0, "negative_weight": 0.3, "adaptive_margin": 0.2}),
        ("sphereface2", {"scale": 8.0, "margin_gradient": "exact"}),
    ],
)
def test_sum_tile_of_a_total(
    loss: str, values: dict, kind: str, n: int, m: int, dtype: torch.dtype
) -> None:
    """Two tiles after each other, the second of them a part of the first."""
    problem = pair_problem(kind, n, m, dtype, False)
    call = make_call(loss, problem.a, problem.b, **values)
    engine = TritonEngine(call)
    problem.a, _ = engine.normalize_rows(problem.a, 0, n)
    if kind == "diagonal":
        problem.b = problem.a
    else:
        problem.b, _ = engine.normalize_rows(problem.b, 0, m)
    sums = torch.zeros(2, engine.total_slots, device=DEVICE)
    expected = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    for part in (slice(None), slice(35)):
        some = dataclasses.replace(
            problem,
            a=problem.a[part],
            b=problem.b[part],
            a_labels=problem.a_labels[part],
            b_labels=problem.b_labels[part],
            a_threshold=problem.a_threshold[:1].expand(n)[part],
            b_threshold=problem.a_threshold[:1].expand(m)[part],
        )
        start = m if kind in ("both", "remote") else 0
        tile = SumTile(
            *(some.a, some.b, *engine.prepare_labels(some.a_labels, some.b_labels)),
            *(problem.a_threshold[:1].contiguous(),) * 2,
            *(None, None, sums[0], sums[0] if kind == "both" else None, sums[1]),
            a_start=start,
            b_start=0,
            diagonal=0 if kind == "diagonal" else None,
            mirrored=kind != "memory",
            gradient=True,
            total=True,
        )
        gradient = engine.sum_tile(tile)
        assert gradient is not None
        want = some.expected(call)
        expected[0] += want["a_loss"].sum() + (want["b_loss"].sum() if kind == "both" else 0.0)
        expected[1] += want["d_a"].sum() + want["d_b"].sum()
        found = engine.matmul(gradient, some.b)
        assert relative(found, want["gradient"] @ some.b.double()) < TOLERANCE[dtype]
        found = engine.matmul(gradient.T, some.a)
        assert relative(found, want["gradient"].T @ some.a.double()) < TOLERANCE[dtype]
    assert relative(sums.sum(1), expected) < TOLERANCE[dtype]


def test_sum_tile_of_losses_only_equals_the_one_with_gradients() -> None:
    problem = pair_problem("diagonal", 70, 70, torch.float32, False)
    losses = []
    for gradient in (False, True):
        engine = TritonEngine(make_call("uss", problem.a), gradients=gradient)
        unit, _ = engine.normalize_rows(problem.a, 0, 70)
        labels, _ = engine.prepare_labels(problem.a_labels, problem.a_labels)
        threshold, loss = problem.a_threshold[:1], torch.zeros(70, device=DEVICE)
        tile = SumTile(
            *(unit, unit, labels, labels, threshold, threshold, None, None, loss, None, None),
            a_start=128,
            b_start=128,
            diagonal=0,
            mirrored=True,
            gradient=gradient,
        )
        assert (engine.sum_tile(tile) is None) == (not gradient)
        losses.append(loss)
    assert torch.equal(*losses)
