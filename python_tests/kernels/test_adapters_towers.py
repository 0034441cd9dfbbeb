"""Losses under the names of open_clip, sentence-transformers and SupContrast, against the formulas
of their code, written anew in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import TARGETS, Target
from support.rounding import spreads
from support.tolerances import EXACT, check_all, check_same
from torch import Tensor, nn
from torch.nn import functional as F

from unitsface_kernels.adapters.open_clip import ClipLoss, SigLipLoss
from unitsface_kernels.adapters.sentence_transformers import (
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)
from unitsface_kernels.adapters.sup_contrast import SupConLoss

each_target = pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.backend != "triton"], ids=str
)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _agree(
    target: Target, ours: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor
) -> None:
    def evaluated(loss: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(target.device, dtype, copy=True).requires_grad_() for t in inputs]
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        return {"loss": value.detach(), **{f"{k}": g for k, g in enumerate(gradients)}}

    exact = target.backend == "reference"
    got = evaluated(ours, torch.float64 if exact else torch.float32)
    want = spreads(lambda: evaluated(formula, torch.float64))
    if not exact:
        check_all(got, want)
        return
    for name, value in got.items():
        check_same(name, value, want[name].want, EXACT)


# --- open_clip ------------------------------------------------------------------------------------


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


@each_target
def test_clip_loss(target: Target) -> None:
    module = ClipLoss(backend=target.backend)

    def formula(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """src/open_clip/loss.py, ClipLoss."""
        logits, truth = _logits(a, b, scale), torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    inputs = _normal(9, 7, seed=1), _normal(9, 7, seed=2), torch.tensor(6.0)
    _agree(target, module, formula, *inputs)
    found = module(*inputs, logit_bias=torch.tensor(3.0), output_dict=True)
    torch.testing.assert_close(found["contrastive_loss"], module(*inputs))


def test_the_bias_of_clip_has_a_gradient_of_zero() -> None:
    """Without any, data parallelism would wait for it."""
    bias = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    loss = ClipLoss()(_normal(9, 7, seed=1), _normal(9, 7, seed=2), 6.0, bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert bias.grad is not None
    assert not bias.grad.any()


@each_target
def test_siglip_loss(target: Target) -> None:
    module = SigLipLoss(backend=target.backend)

    def formula(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """src/open_clip/loss.py, SigLipLoss."""
        signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
        return -F.logsigmoid(signs * (_logits(a, b, scale) + bias)).sum() / len(a)

    inputs = _normal(9, 7, seed=1), _normal(9, 7, seed=2), torch.tensor(6.0), torch.tensor(-4.0)
    _agree(target, module, formula, *inputs)
    found = module(*inputs, output_dict=True)
    torch.testing.assert_close(found["contrastive_loss"], module(*inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod must be False"),
        (lambda: ClipLoss(local_loss=True, world_size=2), "gather_with_grad must be True"),
        (lambda: SigLipLoss(dist_impl="tree"), "dist_impl must be one of"),
        (
            lambda: ClipLoss(gather_with_grad=True, world_size=2)(*[torch.ones(2, 3)] * 2, 1.0),
            "world_size must be that of the default group, 1, got 2",
        ),
    ],
)
def test_open_clip_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- sentence-transformers ------------------------------------------------------------------------


class _Model(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


@each_target
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_multiple_negatives_ranking(target: Target, negatives: int, symmetric: bool) -> None:
    cls = MultipleNegativesSymmetricRankingLoss if symmetric else MultipleNegativesRankingLoss
    module = cls(_Model(), 15.0, cos_sim, backend=target.backend)

    def ours(*columns: Tensor) -> Tensor:
        return module([{"x": x} for x in columns], torch.zeros(len(columns[0])))

    def formula(anchors: Tensor, *others: Tensor) -> Tensor:
        """sentence_transformers/losses/MultipleNegatives{Symmetric,}RankingLoss.py."""
        scores = 15.0 * cos_sim(anchors, torch.cat(others))
        truth = torch.arange(len(anchors), device=anchors.device)
        forth = F.cross_entropy(scores, truth)
        back = F.cross_entropy(scores[:, : len(anchors)].T, truth)
        return (forth + back) / 2 if symmetric else forth

    _agree(target, ours, formula, *(_normal(8, 6, seed=k) for k in range(2 + negatives)))


def test_sentence_transformers_errors() -> None:
    for options, message in (
        ({"scale": 0.0}, "scale must be > 0"),
        ({"similarity_fct": torch.matmul}, "similarity_fct must be cos_sim"),
        ({"directions": ("doc_to_query",)}, "directions must be"),
        ({"hardness_mode": "all_negatives"}, "hardness_mode must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            MultipleNegativesRankingLoss(_Model(), **options)
    module = MultipleNegativesRankingLoss(_Model())
    assert module.get_config_dict()["scale"] == 20.0
    with pytest.raises(ValueError, match="embeddings must be those of anchors and of positives"):
        module([{"x": torch.ones(2, 3)}])


# --- SupContrast ----------------------------------------------------------------------------------


def _sup_con(
    features: Tensor, labels: Tensor | None, mask: Tensor | None, mode: str, t: float, base: float
) -> Tensor:
    """losses.py, SupConLoss, with 0 for anchors without a positive as in its later version."""
    count, views = features.shape[:2]
    if mask is None:
        labels = torch.arange(count) if labels is None else labels
        mask = labels[:, None] == labels
    columns = F.normalize(torch.cat(features.unbind(1)), dim=1)
    rows = columns if mode == "all" else columns[:count]
    z = rows @ columns.T / t
    others = ~torch.eye(len(rows), len(columns), dtype=torch.bool, device=z.device)
    mask = mask.to(z).repeat(len(rows) // count, views) * others
    log_sums = torch.where(others, z, -torch.inf).logsumexp(dim=1)
    weight = mask.sum(dim=1)
    means = (mask * torch.where(others, z, 0.0)).sum(dim=1) / weight.clamp(min=1e-30)
    return t / base * torch.where(weight > 0, log_sums - means, 0.0).mean()


@each_target
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("kind", ["none", "labels", "classes", "asymmetric", "weights"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_sup_con(target: Target, kind: str, mode: str, views: int) -> None:
    if kind == "none" and views == 1:
        pytest.skip("no anchor has a positive")
    labels = torch.tensor([4, -1, 4, 7, -1, 4, 0], device=target.device)
    mask = {
        "classes": labels[:, None] == labels,
        "asymmetric": torch.ones(7, 7, device=target.device).tril(),
        "weights": torch.rand(7, 7, generator=torch.Generator().manual_seed(9)).to(target.device),
    }.get(kind)
    given = labels if kind == "labels" else None
    module = SupConLoss(0.2, mode, 0.1, backend=target.backend)

    def ours(x: Tensor) -> Tensor:
        return module(x, given, mask)

    def formula(x: Tensor) -> Tensor:
        return _sup_con(x, given, mask, mode, 0.2, 0.1)

    _agree(target, ours, formula, _normal(7, views, 5, seed=3))


def test_sup_con_with_a_mask_under_autocast() -> None:
    """The reference stays as exact as without."""
    features, mask = _normal(9, 14, seed=1).view(9, 2, 7), (_normal(9, 9, seed=2) > 0).float()
    module = SupConLoss(backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = module(features, mask=mask)
    torch.testing.assert_close(got, module(features, mask=mask))


def test_sup_con_of_more_dimensions_and_errors() -> None:
    features, module = _normal(4, 2, 3, 5, seed=1), SupConLoss()
    torch.testing.assert_close(module(features), module(features.flatten(2)))
    assert module(features[:1]).item() == 0.0
    for arguments, message in (
        ((features[:, 0, 0],), "features must have shape"),
        ((features, torch.zeros(3, dtype=torch.int64)), "labels must have 4 elements, got 3"),
        ((features, None, torch.ones(3, 4)), r"mask must have shape \(4, 4\)"),
        ((features, torch.zeros(4), torch.ones(4, 4)), "mask must be None with labels"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments)
    with pytest.raises(ValueError, match="contrast_mode must be one of"):
        SupConLoss(contrast_mode="two")
