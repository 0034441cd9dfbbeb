"""Losses between two towers, against the formulas of published code, written anew in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.grid import extended_if
from support.helpers import FUSED, TARGETS, Target, patched_blocks
from support.rounding import spreads
from support.tolerances import EXACT, check_all, check_same
from torch import Tensor
from torch.nn import functional as F

import unitsface_kernels as uk

Loss = Callable[..., Tensor]


def _of(targets: list[Target]) -> pytest.MarkDecorator:
    found = [pytest.param(t, id=str(t), marks=extended_if(t.interpreted)) for t in targets]
    return pytest.mark.parametrize("target", found)


each_target, each_fused = _of(TARGETS), _of(FUSED)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _towers(count: int, more: int = 0, dim: int = 12, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of which the first ``count`` rows match, at different lengths."""
    a, b = _normal(count, dim, seed=1), _normal(count + more, dim, seed=2)
    b[:count] = a + noise * b[:count]
    return a * (0.5 + torch.rand(count, 1, generator=torch.Generator().manual_seed(3))), b


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def _clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """open_clip, src/open_clip/loss.py, ClipLoss without ranks: figure 3 of the paper."""
    logits, truth = scale * _cosines(a, b), torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def _siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip, src/open_clip/loss.py, SigLipLoss without ranks: algorithm 1 of the paper."""
    logits = scale * _cosines(a, b) + bias
    signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def _info_nce(
    a: Tensor, b: Tensor, scale: Tensor, labels: Tensor, key_labels: Tensor, both: bool
) -> Tensor:
    """SupContrast, losses.py, between two sets of features: eq. 2 of the paper."""
    logits = scale * _cosines(a, b)
    takes_part = (labels >= 0)[:, None] & (key_labels >= 0)
    positive = (labels[:, None] == key_labels) & takes_part
    found = []
    for z, pairs, valid in ((logits, positive, takes_part), (logits.T, positive.T, takes_part.T)):
        some = pairs.any(dim=1)
        log_sums = torch.where(valid, z, -torch.inf)[some].logsumexp(dim=1)
        means = torch.where(pairs, z, 0.0)[some].sum(dim=1) / pairs[some].sum(dim=1)
        found.append(log_sums - means)
    return torch.cat(found if both else found[:1]).mean()


def _evaluated(loss: Loss, inputs: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    named = {f"gradient {k}": gradient for k, gradient in enumerate(gradients)}
    return {"loss": value.detach(), **named}


def _agree(target: Target, ours: Loss, formula: Loss, inputs: Sequence[Tensor]) -> None:
    inputs = [t.to(target.device) for t in inputs]
    if target.backend == "reference":
        want = _evaluated(formula, inputs, torch.float64)
        for name, value in _evaluated(ours, inputs, torch.float64).items():
            check_same(name, value, want[name], EXACT)
        return
    want = spreads(lambda: _evaluated(formula, inputs, torch.float64))
    check_all(_evaluated(ours, inputs, torch.float32), want)


SIZES = [(1, 12), (2, 3), (37, 12)]
SCALE, BIAS = torch.tensor(1 / 0.07), torch.tensor(-10.0)


@each_target
@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_clip(target: Target, count: int, dim: int, monkeypatch) -> None:
    patched_blocks(monkeypatch, (16, 8))

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return uk.fused_clip_loss(a, b, scale, backend=target.backend)

    _agree(target, ours, _clip, (*_towers(count, dim=dim), SCALE))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_siglip(target: Target, count: int, dim: int, monkeypatch) -> None:
    patched_blocks(monkeypatch, (16, 8))

    def ours(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return uk.fused_siglip_loss(a, b, scale, bias, backend=target.backend)

    _agree(target, ours, _siglip, (*_towers(count, dim=dim), SCALE, BIAS))


def _labels(count: int, keys: int, kind: str) -> tuple[Tensor, Tensor]:
    """``kind``: each key's query by place; some of few, or of many, labels; one of a label."""
    if kind == "place":
        return torch.arange(count), torch.arange(keys)
    if kind == "single":
        return torch.arange(count), torch.arange(keys).flip(0)
    labels = {"few": 3, "many": 4 * count}[kind]
    generator = torch.Generator().manual_seed(5)
    found = torch.randint(-1, labels, (count + keys,), generator=generator)
    found[0] = found[-1] = 0
    return found[:count], found[count:]


@each_target
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["place", "few", "many", "single"])
def test_info_nce(target: Target, kind: str, both: bool, monkeypatch) -> None:
    patched_blocks(monkeypatch, (16, 8))
    count, more = 29, 8
    labels, key_labels = (t.to(target.device) for t in _labels(count, count + more, kind))

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        given = (None, None) if kind == "place" else (labels, key_labels)
        return uk.fused_info_nce_loss(a, b, *given, scale, both=both, backend=target.backend)

    def formula(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return _info_nce(a, b, scale, labels, key_labels, both)

    _agree(target, ours, formula, (*_towers(count, more), torch.tensor(9.0)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scale_of_any_shape_and_dtype(backend: str, reduction: str) -> None:
    labels, key_labels = _labels(9, 14, "many")
    towers, options = _towers(9, 5), {"reduction": reduction, "backend": backend}
    given = (*(t.float() for t in towers), labels, key_labels)
    want = uk.fused_info_nce_loss(*given, 20.0, **options)
    for scale in (torch.tensor([[20.0]]), torch.tensor([20.0], dtype=torch.float64)):
        got = uk.fused_info_nce_loss(*given, scale.requires_grad_(), **options)
        torch.testing.assert_close(got, want)
        assert torch.autograd.grad(got.sum(), scale)[0].shape == scale.shape


def test_the_reference_under_autocast() -> None:
    labels, key_labels = _labels(9, 14, "many")
    given = (*(t.float() for t in _towers(9, 5)), labels, key_labels, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = uk.fused_info_nce_loss(*given, backend="reference")
    torch.testing.assert_close(got, uk.fused_info_nce_loss(*given, backend="reference"))


@each_target
def test_keys_that_hold_the_queries(target: Target) -> None:
    """Queries are the first of two views of every sample, keys both views, as SupCon's "one"."""
    labels = torch.tensor([0, 1, 0, 2, 3, 1, 0], device=target.device)
    keys = labels.repeat(2)
    own = torch.eye(len(labels), len(keys), dtype=torch.bool, device=target.device)

    def ours(x: Tensor) -> Tensor:
        options = {"batch_offset": 0, "backend": target.backend}
        return uk.fused_info_nce_loss(x[: len(labels)], x, labels, keys, 8.0, **options)

    def formula(x: Tensor) -> Tensor:
        z = 8.0 * _cosines(x[: len(labels)], x)
        positive = (labels[:, None] == keys) & ~own
        means = torch.where(positive, z, 0.0).sum(dim=1) / positive.sum(dim=1)
        return (torch.where(own, -torch.inf, z).logsumexp(dim=1) - means).mean()

    _agree(target, ours, formula, (_normal(len(keys), 6, seed=7),))


@each_fused
@pytest.mark.parametrize("labeled", [False, True])
def test_next_to_nothing_is_exact(target: Target, labeled: bool) -> None:
    """For a lone positive, log(e^p + e^n) - p cancels; softplus(n - p) does not."""
    a, b = (t.to(target.device) for t in _towers(6, dim=64, noise=1e-3))
    places = torch.arange(6, device=target.device) if labeled else None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            z = 60.0 * _cosines(x, y)
            gap = torch.where(torch.eye(6, dtype=torch.bool, device=x.device), -torch.inf, z)
            sides = [F.softplus(side.logsumexp(dim=1) - z.diagonal()) for side in (gap, gap.T)]
            return torch.cat(sides).mean()
        return uk.fused_info_nce_loss(x, y, places, places, 60.0, both=True, backend=target.backend)

    want = spreads(lambda: _evaluated(loss, (a, b), torch.float64))
    assert 0.0 < want["loss"].want < 1e-9
    check_all(_evaluated(loss, (a, b), torch.float32), want)


# --- what else a call can be ----------------------------------------------------------------------


@each_target
def test_reductions(target: Target) -> None:
    a, b = (t.to(target.device) for t in _towers(9))
    for loss in (
        lambda **o: uk.fused_clip_loss(a, b, 5.0, **o),
        lambda **o: uk.fused_siglip_loss(a, b, 5.0, -2.0, **o),
    ):
        per_pair = loss(reduction="none", backend=target.backend)
        assert per_pair.shape == (9,)
        for reduction, want in (("mean", per_pair.mean()), ("sum", per_pair.sum())):
            got = loss(reduction=reduction, backend=target.backend)
            torch.testing.assert_close(got, want)
    both = uk.fused_info_nce_loss(a, b, None, None, 5.0, both=True, reduction="none")
    torch.testing.assert_close(both.mean(), uk.fused_clip_loss(a, b, 5.0))


@each_target
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_tower_may_be_frozen(target: Target, frozen: int) -> None:
    """The frozen tower is changed before the backward pass."""
    inputs = [t.to(target.device) for t in _towers(9)]
    for loss in (uk.fused_clip_loss, lambda a, b, s, **o: uk.fused_siglip_loss(a, b, s, -2.0, **o)):
        wanted = [t.clone().requires_grad_() for t in inputs]
        loss(*wanted, 5.0, backend=target.backend).backward()
        leaves = [t.clone().requires_grad_(k != frozen) for k, t in enumerate(inputs)]
        value = loss(*leaves, 5.0, backend=target.backend)
        if target.backend != "reference" and frozen == 1:
            leaves[1].fill_(-1.0)
        value.backward()
        torch.testing.assert_close(leaves[1 - frozen].grad, wanted[1 - frozen].grad)
        assert leaves[frozen].grad is None


@pytest.mark.parametrize("both", [True, False])
@each_target
def test_ignored_rows_of_either_tower_may_be_anything(target: Target, both: bool) -> None:
    a, b = (t.to(target.device) for t in _towers(9, 3))
    labels, key_labels = (t.to(target.device) for t in _labels(9, 12, "few"))
    labels[4], key_labels[7] = -1, -1
    kept, kept_keys = labels != -1, key_labels != -1
    options = {"both": both, "backend": target.backend}
    some = [t.clone().requires_grad_() for t in (a[kept], b[kept_keys])]
    want = uk.fused_info_nce_loss(*some, labels[kept], key_labels[kept_keys], 5.0, **options)
    want.backward()
    a[~kept], b[~kept_keys] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (a, b)]
    got = uk.fused_info_nce_loss(*leaves, labels, key_labels, 5.0, **options)
    got.backward()
    torch.testing.assert_close(got, want)
    for leaf, part, taken in zip(leaves, some, (kept, kept_keys), strict=True):
        torch.testing.assert_close(leaf.grad[taken], part.grad)
        assert not leaf.grad[~taken].any()


@each_target
def test_not_finite_in_either_tower(target: Target) -> None:
    for tower in (0, 1):
        inputs = [t.to(target.device) for t in _towers(5)]
        inputs[tower][3] = torch.inf
        assert uk.fused_clip_loss(*inputs, 5.0, backend=target.backend).isnan()
        assert uk.fused_siglip_loss(*inputs, 5.0, -2.0, backend=target.backend).isnan()


@each_fused
def test_the_first_tile_that_is_not_finite_is_named(target: Target, monkeypatch) -> None:
    monkeypatch.setenv("UNITSFACE_CHECK", "1")
    a, b = (t.to(target.device).requires_grad_() for t in _towers(5))
    uk.fused_clip_loss(a, b, 5.0, backend=target.backend).backward()
    labels = torch.arange(5, device=target.device)
    labels[2] = -1
    options = {"both": True, "reduction": "none", "backend": target.backend}
    losses = uk.fused_info_nce_loss(a, b, labels, labels, 5.0, **options)
    losses.backward(torch.ones_like(losses))
    with torch.no_grad():
        b[3] = torch.nan
    with pytest.raises(FloatingPointError, match="second tower are not finite in rows 3"):
        uk.fused_clip_loss(a, b, 5.0, backend=target.backend)


class _Soft(uk.policy.Pair):
    combine = "softplus"
    scale: uk.policy.Number = 4.0
    b: uk.policy.Threshold

    def positive(self, c):
        return self.scale * (c - 0.1) - self.b

    def negative(self, c):
        return self.scale * c - self.b


class _Softmax(uk.policy.Pair):
    combine = "logsumexp"

    def positive(self, c):
        return 5.0 * (c - 0.1)

    def negative(self, c):
        return 5.0 * c


class _Two(uk.policy.Pair):
    combine = "logsumexps"

    def positive(self, c):
        return -2.0 * c

    def negative(self, c):
        return 5.0 * c

    def finish(self, positives, negatives):
        return uk.policy.softplus(positives + negatives)


@pytest.mark.parametrize(
    ("target", "policy", "offset"),
    [
        pytest.param(
            target,
            policy(),
            offset,
            id=f"{target}-{policy.__name__}-{offset}",
            # One of a mechanism against an interpreter, which takes seconds.
            marks=extended_if(target.interpreted and offset is not None),
        )
        for target in TARGETS
        for policy in (_Soft, _Softmax, _Two)
        for offset in (None, 2)
    ],
)
def test_any_loss_of_pairs_may_have_a_second_tower(
    target: Target, policy: uk.policy.Pair, offset: int | None, monkeypatch
) -> None:
    """The losses of the rows are those against a memory, and those of the columns, too."""
    patched_blocks(monkeypatch, (16, 8))
    # An interpreter takes a tile as long as a processor a thousand.
    count, more = (19, 9) if not target.interpreted else (5, 3)
    a, b = (t.to(target.device) for t in _towers(count, more))
    labels, key_labels = (t.to(target.device) for t in _labels(count, count + more, "few"))
    threshold = {"b": 1.5} if isinstance(policy, _Soft) else {}
    options = {**threshold, "reduction": "none", "backend": target.backend}

    def one_way(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, place: int | None) -> Tensor:
        memory = {"memory": y, "memory_labels": of_y, "batch_offset": place}
        return uk.fused_pair_loss(policy, x, of_x, **memory, **options)

    leaves = [t.clone().requires_grad_() for t in (a, b)]
    memory = {"memory": leaves[1], "memory_labels": key_labels, "batch_offset": offset}
    got = uk.fused_pair_loss(policy, leaves[0], labels, both=True, **memory, **options)
    weights = 0.5 + torch.rand(len(got), generator=torch.Generator().manual_seed(1)).to(got)
    got.backward(weights)
    others = [t.clone().requires_grad_() for t in (a, b)]
    back = None if offset is None else -offset
    want = torch.cat(
        [
            one_way(*others, labels, key_labels, offset),
            one_way(*others[::-1], key_labels, labels, back),
        ]
    )
    want.backward(weights)
    torch.testing.assert_close(got, want)
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)


@each_fused
def test_compiled_by_the_operator(target: Target) -> None:
    inputs = [*(t.to(target.device) for t in _towers(7)), torch.tensor(5.0, device=target.device)]

    def loss(*leaves: Tensor) -> Tensor:
        given = {"backend": target.backend}
        return uk.fused_clip_loss(*leaves, **given) + uk.fused_siglip_loss(*leaves, -2.0, **given)

    want = _evaluated(loss, inputs, torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for name, value in _evaluated(compiled, inputs, torch.float32).items():
        torch.testing.assert_close(value, want[name])
