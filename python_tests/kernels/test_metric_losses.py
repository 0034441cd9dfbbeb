"""Losses of metric learning against published formulas, written anew in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.ranks import own_rows, run_ranks
from torch import Tensor
from torch import distributed as dist

import unitsface_kernels as uk
from unitsface_kernels import dispatch

BACKENDS = [
    name
    for name in ("native", "triton")
    if dispatch.unavailable(name, "cpu", torch.float32) is None
]
LABELS = torch.tensor([0] * 5 + [1] * 5 + [2, 2, 3, 3, 4, 5, 6, 6, -1, -1])


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def _agrees(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    """Loss and gradients in float64; the fused ones agree with these by the parity tests."""
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def _proxy_nca(feats: Tensor, proxies: Tensor, labels: Tensor, scale: float, everyone: bool):
    """As ``ProxyNCA_classic`` and, with ``everyone``, ``ProxyNCA_prob`` of loss.py
    (euwern/proxynca_pp), whose scale is the root of this one. The latter and proxynca.py of
    dichotomies/proxy-nca, which smooths labels, have the own proxy in the denominator; the paper of
    2017, eq. 4, and the former do not.
    """
    feats, labels = feats[labels >= 0], labels[labels >= 0]
    a, b = F.normalize(feats, dim=1), F.normalize(proxies, dim=1)
    distance = scale * (a[:, None] - b[None]).square().sum(dim=2)
    own = F.one_hot(labels, len(proxies)).bool()
    numerator = torch.exp(-distance)[own]
    others = torch.exp(-distance).masked_fill(own & (not everyone), 0.0)
    return -torch.log(numerator / others.sum(dim=1)).mean()


@pytest.mark.parametrize("scale", [1.0, 9.0])
@pytest.mark.parametrize("denominator", ["negatives", "all"])
def test_proxy_nca(denominator: str, scale: float) -> None:
    feats, proxies = _normal(len(LABELS), 6, seed=1), _normal(9, 6, seed=2)
    options = {"scale": scale, "denominator": denominator, "backend": "reference"}
    got = uk.fused_proxy_nca_loss(feats, proxies, LABELS, **options)
    want = _proxy_nca(feats, proxies, LABELS, scale, denominator == "all")
    _agrees(got, want, feats, proxies)


def test_proxy_nca_of_one_class() -> None:
    """Without another class there is no sum of negatives."""
    feats, proxies = _normal(3, 6, seed=1).float(), _normal(1, 6, seed=2).float()
    labels = torch.zeros(3, dtype=torch.int64)
    for backend in ("native", "reference"):
        feats.requires_grad_()
        loss = uk.fused_proxy_nca_loss(feats, proxies, labels, backend=backend)
        assert float(loss.detach()) == 0.0
        (gradient,) = torch.autograd.grad(loss, feats)
        assert not bool(gradient.any())


def _contrastive(feats: Tensor, labels: Tensor, positive_margin: float, negative_margin: float):
    """Terms of ``ContrastiveLoss`` of losses/contrastive_loss.py
    (KevinMusgrave/pytorch-metric-learning) with power 2, halved as in the paper; that code divides
    those of either kind by the number of pairs, or of those that are not 0, here rows divide.
    """
    unit = F.normalize(feats, dim=1)
    total = feats.new_zeros(())
    for i in range(len(labels)):
        for j in range(len(labels)):
            if i == j or labels[i] < 0 or labels[j] < 0:
                continue
            apart = torch.linalg.vector_norm(unit[i] - unit[j])
            same = labels[i] == labels[j]
            hinge = apart - positive_margin if same else negative_margin - apart
            total = total + 0.5 * F.relu(hinge) ** 2
    return total / (labels >= 0).sum()


@pytest.mark.parametrize(("positive_margin", "negative_margin"), [(0.0, 1.0), (0.9, 1.3)])
def test_contrastive(positive_margin: float, negative_margin: float) -> None:
    feats = _normal(len(LABELS), 6, seed=3)
    margins = {"positive_margin": positive_margin, "negative_margin": negative_margin}
    got = uk.fused_contrastive_loss(feats, LABELS, backend="reference", **margins)
    _agrees(got, _contrastive(feats, LABELS, **margins), feats)


def _batch_hard(
    feats: Tensor, labels: Tensor, margin: float, soft: bool, squared: bool, k: int = 1
) -> Tensor:
    """As ``batch_hard`` of loss.py (VisualComputingInstitute/triplet-reid), whose furthest positive
    may be the anchor itself, on unit vectors; that code has metrics "euclidean" and "sqeuclidean"
    and averages over all anchors. The k nearest negatives, of which it has one, are averaged."""
    feats, labels = feats[labels >= 0], labels[labels >= 0]
    unit = F.normalize(feats, dim=1)
    distance = torch.sum((unit[:, None] - unit[None]).square(), dim=2)
    if not squared:
        distance = distance.clamp_min(1e-4).sqrt()
    total, rows = feats.new_zeros(()), 0
    for i in range(len(labels)):
        same = labels == labels[i]
        negatives = distance[i][~same].sort().values[:k]
        same[i] = False
        if bool(same.any()) and len(negatives):
            gap = distance[i][same].max() - negatives
            terms = F.softplus(gap) if soft else F.relu(gap + margin)
            total, rows = total + terms.mean(), rows + 1
    return total / rows


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize("hinge", ["hard", "soft"])
def test_triplet(hinge: str, distance: str, k: int) -> None:
    feats = _normal(len(LABELS), 6, seed=4)
    options = {"margin": 0.3, "k": k, "distance": distance, "hinge": hinge}
    got = uk.fused_triplet_loss(feats, LABELS, backend="reference", **options)
    want = _batch_hard(feats, LABELS, 0.3, hinge == "soft", distance == "squared", k)
    _agrees(got, want, feats)


def _simple(
    feats: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    b: Tensor,
    values: dict[str, float],
    offset: int | None,
) -> Tensor:
    """As ``SimPLE.forward`` of opensphere/module/head/simple.py (ydwen/opensphere) in its Cartesian
    mode; it has no ignored labels, and the batch is always in its bank."""
    same = labels[:, None] == bank_labels[None]
    valid = (labels >= 0)[:, None] & (bank_labels >= 0)
    if offset is not None:
        valid[torch.arange(len(labels)), torch.arange(len(labels)) + offset] = False
    norms = torch.linalg.vector_norm(feats, dim=1), torch.linalg.vector_norm(bank, dim=1)
    score = feats @ bank.T - values["b_theta"] * norms[0][:, None] * norms[1]
    of_positives = (score[valid & same] - values["margin"] + b) / values["r"]
    of_negatives = (score[valid & ~same] + values["margin"] + b) * values["r"]
    alpha, bce = values["alpha"], F.binary_cross_entropy_with_logits
    return values["loss_weight"] * (
        alpha * bce(of_positives, torch.ones_like(of_positives))
        + (1.0 - alpha) * bce(of_negatives, torch.zeros_like(of_negatives))
    )


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_simple(backend: str, memory: bool) -> None:
    feats, b = _normal(len(LABELS), 6, seed=5), torch.tensor(-1.5, dtype=torch.float64)
    b.requires_grad_()
    values = {"b_theta": 0.3, "alpha": 0.1, "r": 2.0, "margin": 0.2, "loss_weight": 50.0}
    bank, bank_labels, offset = feats, LABELS, 0
    leaves, given = [feats, b], {}
    if memory:
        # The batch is in it, as copies without a graph, and other features.
        bank = torch.cat([_normal(5, 6, seed=6), feats]).detach().requires_grad_()
        bank_labels, offset = torch.cat([torch.tensor([0, 1, 9, -1, 2]), LABELS]), 5
        given = {"memory": bank, "memory_labels": bank_labels, "batch_offset": offset}
        leaves.append(bank)
    want = _simple(feats, LABELS, bank, bank_labels, b, values, offset)
    if backend == "reference":
        got = uk.fused_simple_loss(feats, LABELS, b, backend=backend, **given, **values)
        _agrees(got, want, *leaves)
        return
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    if memory:
        given["memory"] = narrow[2]
    got = uk.fused_simple_loss(narrow[0], LABELS, narrow[1], backend=backend, **given, **values)
    _near(got, want, narrow, leaves)


def _near(got: Tensor, want: Tensor, narrow: list[Tensor], leaves: list[Tensor]) -> None:
    """Compares loss and gradients in float32."""
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)
    of_want = torch.autograd.grad(want, leaves, retain_graph=True)
    for one, other in zip(torch.autograd.grad(got, narrow), of_want, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_simple_of_proxies() -> None:
    """The same code, whose bank is one sample of each class."""
    feats, proxies = _normal(len(LABELS), 6, seed=5), _normal(9, 6, seed=6)
    b = torch.tensor(-1.5, dtype=torch.float64).requires_grad_()
    values = {"b_theta": 0.3, "alpha": 0.1, "r": 2.0, "margin": 0.2, "loss_weight": 50.0}
    leaves = [feats, proxies, b]
    want = _simple(feats, LABELS, proxies, torch.arange(9), b, values, None)
    got = uk.fused_simple_proxy_loss(feats, proxies, LABELS, b, backend="reference", **values)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    # Behind others that take no part.
    index = torch.arange(9) + 2
    for backend in BACKENDS:
        narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
        more = torch.cat([torch.ones(2, 6), narrow[1]])
        options = {"class_index": index, "backend": backend, **values}
        got = uk.fused_simple_proxy_loss(narrow[0], more, LABELS, narrow[2], **options)
        _near(got, want, narrow, leaves)


def test_simple_module() -> None:
    module = uk.SimPLELoss(init_bias=-2.0, backend="native")
    feats = _normal(len(LABELS), 6, seed=5).detach().float()
    loss = module(feats, LABELS)
    assert torch.equal(loss, uk.fused_simple_loss(feats, LABELS, -2.0, backend="native"))
    loss.backward()
    assert float(module.bias.grad.abs()) > 0.0
    assert "init_bias=-2.0" in repr(module)


def _proxy_anchor(feats: Tensor, proxies: Tensor, labels: Tensor, alpha: float, margin: float):
    """As ``Proxy_Anchor.forward`` of code/losses.py (tjddus9597/Proxy-Anchor-CVPR2020), which adds
    1e-12 to squared norms and has no ignored labels."""
    feats, labels = feats[labels >= 0], labels[labels >= 0]
    cosine = F.normalize(feats, dim=1) @ F.normalize(proxies, dim=1).T
    own = F.one_hot(labels, len(proxies)).to(cosine)
    positives = (own * torch.exp(-alpha * (cosine - margin))).sum(dim=0)
    negatives = ((1 - own) * torch.exp(alpha * (cosine + margin))).sum(dim=0)
    present = (own.sum(dim=0) > 0).sum()
    return torch.log1p(positives).sum() / present + torch.log1p(negatives).sum() / len(proxies)


@pytest.mark.parametrize("values", [{}, {"alpha": 5.0, "margin": 0.3}], ids=str)
def test_proxy_anchor(values: dict[str, float]) -> None:
    feats, proxies = _normal(len(LABELS), 6, seed=7), _normal(9, 6, seed=8)
    want = _proxy_anchor(feats, proxies, LABELS, **({"alpha": 32.0, "margin": 0.1} | values))
    exact = torch.autograd.grad(want, [feats, proxies], retain_graph=True)
    got = uk.fused_proxy_anchor_loss(feats, proxies, LABELS, backend="reference", **values)
    _agrees(got, want, feats, proxies)
    for backend in BACKENDS:
        narrow = [leaf.detach().float().requires_grad_() for leaf in (feats, proxies)]
        got = uk.fused_proxy_anchor_loss(*narrow, LABELS, backend=backend, **values)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)
        for one, other in zip(torch.autograd.grad(got, narrow), exact, strict=True):
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_proxy_anchor_of_a_subset() -> None:
    feats, proxies = _normal(6, 4, seed=7).float(), _normal(9, 4, seed=8).float()
    index, labels = torch.tensor([7, 1, 4]), torch.tensor([0, 1, 1, 2, -1, 0])
    options = {"backend": "native", "reduction": "none"}
    got = uk.fused_proxy_anchor_loss(feats, proxies, labels, class_index=index, **options)
    want = uk.fused_proxy_anchor_loss(feats, proxies[index], labels, **options)
    assert torch.equal(got, want)
    assert got.shape == (3,)
    with pytest.raises(ValueError, match=r"^labels must be in \[-1, 3\)"):
        uk.fused_proxy_anchor_loss(feats, proxies, labels + 1, class_index=index)


def test_proxy_anchor_module() -> None:
    module = uk.ProxyAnchorLoss(6, 9, alpha=8.0, backend="native")
    feats = _normal(len(LABELS), 6, seed=7).detach().float()
    loss = module(feats, LABELS)
    options = {"alpha": 8.0, "backend": "native"}
    assert torch.equal(loss, uk.fused_proxy_anchor_loss(feats, module.weight, LABELS, **options))
    loss.backward()
    assert bool(module.weight.grad.any())


def _anchors_across(rank: int, counts: tuple[int, ...]) -> None:
    total = sum(counts)
    feats, proxies = _normal(total, 6, seed=7), _normal(9, 6, seed=8)
    labels = torch.randint(-1, 9, (total,), generator=torch.Generator().manual_seed(3))
    rows = own_rows(counts, rank)
    for backend, dtype in (("reference", torch.float64), ("native", torch.float32)):
        whole = [leaf.detach().to(dtype).requires_grad_() for leaf in (feats, proxies)]
        want = uk.fused_proxy_anchor_loss(*whole, labels, backend=backend)
        of_feats, of_proxies = torch.autograd.grad(want, whole)
        own = [whole[0].detach()[rows].requires_grad_(), whole[1].detach().requires_grad_()]
        across = {"backend": backend, "group": dist.group.WORLD}
        got = uk.fused_proxy_anchor_loss(*own, labels[rows], **across)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        d_feats, d_proxies = torch.autograd.grad(got, own)
        # Data parallelism averages gradients of proxies, and takes the number of ranks from those
        # that go on into the backbone.
        dist.all_reduce(d_proxies)
        tight = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(d_proxies / len(counts), of_proxies, **tight)
        torch.testing.assert_close(d_feats / len(counts), of_feats[rows], **tight)


@pytest.mark.parametrize("counts", [(5, 9), (4, 0, 7)], ids=str)
def test_proxy_anchor_across_ranks(counts: tuple[int, ...]) -> None:
    run_ranks(len(counts), _anchors_across, counts)


def _other_proxies(rank: int) -> None:
    feats, proxies, labels = _normal(4, 6, seed=7), _normal(9, 6, seed=8 + rank), torch.arange(4)
    across = {"backend": "reference", "group": dist.group.WORLD}
    with pytest.raises(ValueError, match="the checksum of weight must be the same"):
        uk.fused_proxy_anchor_loss(feats, proxies, labels, **across)
    with pytest.raises(ValueError, match="the shape of weight must be the same"):
        uk.fused_proxy_anchor_loss(feats, proxies[: 9 - rank], labels, **across)


def test_proxies_that_differ_across_ranks_are_an_error() -> None:
    run_ranks(2, _other_proxies)
