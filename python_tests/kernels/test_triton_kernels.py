"""Tiles of the Triton engine, one at a time, against float64 and autograd."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.reference import cosines
from unitsface_kernels.backends.streaming import Call, ClassSums, ClassTile, ClassWeights, SumTile
from unitsface_kernels.losses import REGISTRY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = backend.unavailable(DEVICE, torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

# After the check: these need Triton.
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from unitsface_kernels.backends.triton import launch, workspace  # noqa: E402
from unitsface_kernels.backends.triton.engine import TritonEngine  # noqa: E402
from unitsface_kernels.backends.triton.kernels.tiles import (  # noqa: E402
    grouped_block,
    triangle_block,
)

# For one tile: matmuls in the dtype, everything else in float32.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every buffer, so that an element that nothing wrote shows."""
    allocate = workspace.Workspace.empty

    def poisoned(self: workspace.Workspace, *args: object, **kwargs: object) -> Tensor:
        tensor = allocate(self, *args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    monkeypatch.setattr(workspace.Workspace, "empty", poisoned)


def make_call(
    loss: str,
    rows: Tensor,
    columns: Tensor | None = None,
    per_column: bool = False,
    **values: float | str,
) -> Call:
    spec = REGISTRY[loss]
    if per_column:
        spec = dataclasses.replace(spec, threshold="per_column")
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    params = spec.pack(spec.defaults() | values)
    static = (spec, params, "sum", "triton", rows.dtype, None, 0.0, True, True, True)
    return Call(*static, rows=rows, row_labels=labels, columns=columns)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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


def statistics(
    engine: TritonEngine, rows: Tensor, columns: Tensor, targets: Tensor, waves: list[int]
) -> ClassSums:
    count = rows.shape[0]
    unit, _ = engine.normalize_rows(rows, 0, count)
    maximum = torch.full((count,), -torch.inf, device=DEVICE)
    sums = ClassSums(maximum, *torch.zeros(2, count, device=DEVICE))
    for start, stop in itertools.pairwise(waves):
        tile, _ = engine.normalize_rows(columns, start, stop, reuse=True)
        engine.logsumexp_tile(ClassTile(unit, tile, targets, start), sums)
    return sums


@pytest.mark.parametrize("scale", [8.0, 2000.0])
def test_logsumexp_statistics_over_waves(scale: float) -> None:
    """At the larger scale most terms underflow; the largest of each row must not."""
    rows, columns = torch.randn(45, 50, device=DEVICE), torch.randn(150, 50, device=DEVICE)
    targets = torch.arange(45, device=DEVICE) * 3
    targets[:3] = torch.tensor([-1, -2, 149])
    engine = TritonEngine(make_call("margin_softmax", rows, columns, scale=scale), gradients=False)
    maximum, total, target_cosine = statistics(engine, rows, columns, targets, [0, 64, 65, 150])
    cosine = cosines(rows.double(), columns.double())
    present = targets >= 0
    is_target = torch.zeros_like(cosine, dtype=torch.bool)
    is_target[present, targets[present]] = True
    want = torch.logsumexp((scale * cosine).masked_fill(is_target, -torch.inf), 1)
    assert relative(maximum + torch.log(total), want) < 3e-6
    assert relative(target_cosine[present], cosine[is_target]) < 3e-6
    assert torch.equal(target_cosine[~present], torch.zeros(2, device=DEVICE))


def test_logsumexp_row_without_negatives() -> None:
    rows = torch.randn(3, 50, device=DEVICE)
    engine = TritonEngine(make_call("margin_softmax", rows, rows[:1]), gradients=False)
    targets = torch.tensor([0, -1, 0], device=DEVICE)
    maximum, total, _ = statistics(engine, rows, rows[:1], targets, [0, 1])
    assert torch.equal(maximum.isinf(), targets == 0)
    assert torch.equal(total, (targets != 0).float())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logsumexp_gradient_tile(dtype: torch.dtype) -> None:
    """In float16 with the slopes that a margin has next to the class's own weight."""
    rows, columns = (torch.randn(n, 50, device=DEVICE).to(dtype) for n in (45, 101))
    targets = torch.arange(45, device=DEVICE) + 4
    targets[:2] = torch.tensor([-2, 200])
    call = make_call("margin_softmax", rows, columns, scale=16.0)
    engine = TritonEngine(call)
    a, _ = engine.normalize_rows(rows, 0, 45)
    b, _ = engine.normalize_rows(columns, 0, 101, reuse=True)
    logits = 16.0 * (a.double() @ b.double().T)
    log_negatives = torch.logsumexp(logits, 1)
    weight = torch.rand(45, device=DEVICE)
    own = -weight * torch.linspace(1.0, 3e5, 45, device=DEVICE)
    start = 3
    tile = engine.logsumexp_gradient_tile(
        ClassTile(a, b, targets, start), ClassWeights(log_negatives.float(), weight, own)
    )
    want = 16.0 * weight[:, None] * torch.exp(logits - log_negatives[:, None])
    want[torch.arange(2, 45), targets[2:] - start] = own[2:].double()
    assert tile.isfinite().all()
    assert relative(engine.matmul(tile, b), want @ b.double()) < TOLERANCE[dtype]


def test_float16_keeps_gradients_below_its_own_range() -> None:
    rows, columns = (torch.randn(n, 50, device=DEVICE).half() for n in (40, 60))
    engine = TritonEngine(make_call("margin_softmax", rows, columns, scale=1.0))
    a, _ = engine.normalize_rows(rows, 0, 40)
    b, _ = engine.normalize_rows(columns, 0, 60, reuse=True)
    nothing = torch.zeros(40, device=DEVICE)
    targets = torch.full((40,), -2, device=DEVICE)
    weight = torch.full((40,), 1e-8, device=DEVICE)
    tile = engine.logsumexp_gradient_tile(
        ClassTile(a, b, targets, 0), ClassWeights(nothing, weight, nothing)
    )
    want = 1e-8 * torch.exp(a.double() @ b.double().T) @ b.double()
    assert relative(engine.matmul(tile, b), want) < 4e-2


@pytest.mark.parametrize("parameters", [
    {"m2": 0.0},
    {"m2": 0.5, "m3": 0.0},
    {"m2": -0.4, "m3": 0.1},
    {"m2": 4.0},
    {"m1": 1.7, "m3": 0.0},
    {"m1": 2.3, "m2": 0.9},
    {"m1": 5.0, "margin_gradient": "detached"},
], ids=str)  # fmt: skip
def test_margin_policy(parameters: dict[str, float | str]) -> None:
    """Against its eager formula, everywhere including the ends, where rounding leaves [-1, 1]."""
    ends = torch.tensor([1.0, -1.0, 1.0000001, -1.0000001, 1 - 6e-8, 6e-8 - 1, torch.nan])
    cosine = torch.cat([torch.linspace(-1, 1, 999), ends]).to(DEVICE)
    call = make_call("margin_softmax", cosine[:, None], **parameters)
    logits, slopes = TritonEngine(call).positive_rows(cosine)
    results = {}
    for dtype in (torch.float64, torch.float32):
        x = cosine.to(dtype).requires_grad_()
        want = call.spec.positive(x, None, call.params)
        results[dtype] = want.detach(), torch.autograd.grad(want.sum(), x)[0]
    assert logits[-1].isnan()
    for got, want, eager in zip((logits, slopes), *results.values(), strict=True):
        got, want, eager = got[:-1].double(), want[:-1], eager[:-1].double()
        # Next to theta = 0 the slope amplifies the cosine's rounding, in eager as well.
        scale = want.abs() + 64.0
        eager_error = ((eager - want).abs() / scale).max()
        assert ((got - want).abs() / scale).max() < 1e-6 + 6 * eager_error


@pytest.mark.parametrize("width", [1, 48, 513, 1100])
@pytest.mark.parametrize("indexed", [False, True])
def test_normalize_rows_and_their_jacobian(width: int, indexed: bool) -> None:
    source = torch.randn(30, width, device=DEVICE)
    source[4], source[7] = 0.0, 1e-7 * torch.ones(width, device=DEVICE)
    index = torch.randperm(30, device=DEVICE)[:20] if indexed else None
    if index is not None:
        index[:2] = torch.tensor([4, 7])
    start, stop = (0, 19) if indexed else (3, 30)
    engine = TritonEngine(make_call("uss", source))
    unit, inverse = engine.normalize_rows(source, start, stop, index)
    rows = (source if index is None else source[index])[start:stop].double().requires_grad_()
    want = torch.nn.functional.normalize(rows, dim=1, eps=1e-5)
    assert relative(unit, want.detach()) < 1e-6
    assert relative(inverse, 1 / rows.detach().norm(dim=1).clamp_min(1e-5)) < 1e-6
    d_unit = torch.randn(stop - start, width, device=DEVICE)
    scale = torch.tensor(0.25, device=DEVICE)
    expected = torch.autograd.grad(want, rows, 0.25 * d_unit.double())[0]
    for out in (torch.empty_like(d_unit), d_unit):
        engine.normalize_rows_backward(d_unit, source, start, inverse, out, scale, index)
        # Clamped rows have large gradients: compared by themselves.
        large = expected.norm(dim=1) > 100 * math.sqrt(width)
        for chosen in (large, ~large):
            if width > 1 or not torch.equal(chosen, ~large):
                assert relative(out[chosen], expected[chosen]) < 2e-6
    if width == 1:
        # r (g - <g, u> u) cancels: zero but for rounding.
        assert (out[~large].abs() < 1e-4).all()


def test_labels_are_narrowed_exactly() -> None:
    """Also those that differ in their upper half only, and those next to the limit."""
    first = torch.tensor([5, -1, 2**30 - 1, 2**30, 2**40, 2**40 + 2**33, 5 + 2**32, 0, -9])
    second = torch.tensor([2**40, 5, 2**62, 2**30 + 6, 2**62, 2**30, -1, 5 + 2**32])
    # Many of one residue: they meet in the table, across blocks too.
    many = 2**30 + torch.arange(150) * 2**31
    first, second = torch.cat([first.repeat(30), many]).to(DEVICE), torch.cat([second, many])
    second = second.to(DEVICE)
    engine = TritonEngine(make_call("uss", torch.zeros(1, 1, device=DEVICE)))
    rows, columns = engine.prepare_labels(first, second)
    assert rows.dtype == columns.dtype == torch.int32
    wide, narrow = torch.cat([first, second]), torch.cat([rows, columns])
    assert torch.equal(narrow == -1, wide < 0)
    kept = wide >= 0
    wide, narrow = wide[kept], narrow[kept]
    assert torch.equal(wide[:, None] == wide[None], narrow[:, None] == narrow[None])


def test_classes_without_a_target_here_match_no_column() -> None:
    engine = TritonEngine(make_call("uss", torch.zeros(3, 1, device=DEVICE)))
    rows, columns = engine.prepare_labels(torch.tensor([1, -1, -2], device=DEVICE), None)
    assert columns.tolist() == [0, 1, 2]
    assert rows.tolist() == [1, -1, 3]


@triton.jit
def _blocks_kernel(out, first, second, TRIANGLE: tl.constexpr):
    program = tl.program_id(0)
    if TRIANGLE:
        row, column = triangle_block(program, first)
    else:
        row, column = grouped_block(program, first, second, 3)
    tl.store(out + 2 * program, row)
    tl.store(out + 2 * program + 1, column)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_programs_cover_every_block_once(count: int) -> None:
    for triangle, columns in ((True, count), (False, 5)):
        blocks = [(i, j) for i in range(count) for j in range(i if triangle else 0, columns)]
        out = torch.full((len(blocks), 2), -1, dtype=torch.int32, device=DEVICE)
        _blocks_kernel[(len(blocks),)](out, count, columns, TRIANGLE=triangle)
        assert sorted(map(tuple, out.tolist())) == blocks


def test_unavailable_says_why() -> None:
    assert "float32" in str(backend.unavailable(DEVICE, torch.float64))
    assert backend.unavailable("meta", torch.float32) is not None
    if launch.INTERPRETED:
        assert backend.unavailable("cuda", torch.float32) is not None
    else:
        assert "TRITON_INTERPRET" in str(backend.unavailable("cpu", torch.float32))
