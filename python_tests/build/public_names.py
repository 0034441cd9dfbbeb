"""Every public name as a user's program has it.

pyright reads this file in strict mode (`make lint`), test_types.py runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import unitsface_kernels as uk
from unitsface_kernels import adapters, metrics, policy

N, C, D, K = 8, 5, 16, 4


class Contrastive(policy.Pair):
    margin: policy.Number = 0.4

    def positive(self, c: policy.Expression) -> policy.Expression:
        return 1 - c

    def negative(self, c: policy.Expression) -> policy.Expression:
        return policy.maximum(c - self.margin, 0)


class Margin(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)

    def positive(self, c: policy.Expression) -> policy.Expression:
        return self.scale * (c - 0.2)

    def negative(self, c: policy.Expression) -> policy.Expression:
        return self.scale * c


def functions(x: Tensor, w: Tensor, y: Tensor, b: Tensor) -> list[Tensor]:
    """Losses of features (N, D), class weights (C, D), labels (N,) and a threshold ()."""
    counts = torch.bincount(y, minlength=C)
    margins: Tensor = uk.frequency_margins(counts)
    return [
        uk.fused_adacos_loss(x, w, y, scale=10.0),
        uk.fused_adaface_loss(x, w, y, mean=4.0, std=1.0),
        uk.fused_circle_loss(x, y, scale=32.0, margin=0.25),
        uk.fused_class_loss(Margin(scale=8.0), x, w, y),
        uk.fused_class_margin_loss(x, w, y, margins),
        uk.fused_clip_loss(x, x.roll(1, 0), 10.0),
        uk.fused_contrastive_loss(x, y, distance="cosine"),
        uk.fused_curricularface_loss(x, w, y, t=0.1),
        uk.fused_elasticface_loss(x, w, y, margins[y]),
        uk.fused_info_nce_loss(x, x.roll(1, 0), y, y, 20.0, both=True),
        uk.fused_magface_loss(x, w, y),
        uk.fused_margin_softmax_loss(x, w, y, m2=0.5, m3=0.0, reduction="sum"),
        uk.fused_multi_similarity_loss(x, y),
        uk.fused_mv_softmax_loss(x, w, y),
        uk.fused_npt_loss(x, w, y, k=2),
        uk.fused_pair_bce_loss(x, y, b.expand(C)),
        uk.fused_pair_logsumexp(x, y),
        uk.fused_pair_loss(Contrastive(margin=0.3), x, y),
        uk.fused_pair_softmax_loss(x, y),
        uk.fused_proxy_anchor_loss(x, w, y),
        uk.fused_proxy_nca_loss(x, w, y, denominator="all"),
        uk.fused_siglip_loss(x, x.roll(1, 0), 10.0, -10.0),
        uk.fused_simple_loss(x, y, b),
        uk.fused_simple_proxy_loss(x, w, y, b),
        uk.fused_sphereface2_loss(x, w, y, b),
        uk.fused_triplet_loss(x, y, k=2),
        uk.fused_uce_loss(x, w, y, b),
        uk.fused_unpg_loss(x, w, y, m2=0.5, m3=0.0),
        uk.fused_uss_loss(x, y, b, memory=x.detach(), memory_labels=y, batch_offset=0),
        uk.uss_threshold_init(x, y),
    ]


def class_modules() -> Sequence[nn.Module]:
    return [
        uk.AdaCosLoss(D, C),
        uk.AdaFaceLoss(D, C),
        uk.ArcFaceLoss(D, C, margin=0.4),
        uk.ClassBCELoss(D, C),
        uk.ClassLoss(Margin(), D, C),
        uk.ClassMarginLoss(D, C, learned=True),
        uk.CosFaceLoss(D, C, scale=nn.Parameter(torch.tensor(30.0)), init_std=0.02),
        uk.CurricularFaceLoss(D, C),
        uk.EPLLoss(D, C),
        uk.ElasticFaceLoss(D, C, kind="cos"),
        uk.MVSoftmaxLoss(D, C),
        uk.MagFaceLoss(D, C),
        uk.MarginSoftmaxLoss(D, C, m2=0.3),
        uk.NPTLoss(D, C, k=2),
        uk.NormFaceLoss(D, C),
        uk.ProxyAnchorLoss(D, C),
        uk.ProxyNCALoss(D, C),
        uk.SimPLEProxyLoss(D, C),
        uk.SphereFace2Loss(D, C),
        uk.SphereFaceLoss(D, C),
        uk.SubCenterArcFaceLoss(D, C, centers=2),
        uk.UCELoss(D, C),
        uk.UNPGLoss(D, C),
        uk.UniTSFaceLoss(uk.CosFaceLoss(D, C), uk.USSLoss()),
        uk.VPLLoss(D, C),
        uk.PartialFC("cosface", D, C, sample_rate=0.5),
        *(uk.CLASS_LOSSES[name](D, C) for name in ("normface", "cosface")),
    ]


def pair_modules() -> Sequence[nn.Module]:
    return [
        uk.CircleLoss(),
        uk.ContrastiveLoss(),
        uk.MultiSimilarityLoss(),
        uk.PairBCELoss(C),
        uk.PairLoss(Contrastive()),
        uk.PairSoftmaxLoss(),
        uk.SimPLELoss(),
        uk.TripletLoss(),
        uk.USSLoss(init_threshold=10.0),
        uk.PAIR_LOSSES["uss"](),
    ]


def tower_modules() -> list[uk.CLIPLoss | uk.SigLIPLoss | uk.InfoNCELoss]:
    return [uk.CLIPLoss(), uk.SigLIPLoss(learn_bias=False), uk.InfoNCELoss(both=True)]


def step(x: Tensor, y: Tensor) -> float:
    """A step of partial FC, clipped."""
    backbone = nn.Linear(D, D)
    head = uk.PartialFC("arcface", embedding_size=D, num_classes=C)
    optimizer = uk.SampledSGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    head.fuse(optimizer, "step")
    loss: Tensor = head.forward(backbone(x), y)
    torch.autograd.backward(loss)
    norm: Tensor = uk.clip_grad_norm_(backbone.parameters(), 5.0, [head])
    optimizer.step()
    other = uk.SampledAdamW(backbone.parameters(), lr=1e-3)
    other.zero_grad()
    return norm.item()


def memory(x: Tensor, y: Tensor) -> Tensor:
    kept = uk.FeatureMemory(C, D)
    kept.update(x, y)
    loss = uk.PairSoftmaxLoss()
    return loss.forward(x, y, memory=kept.features, memory_labels=kept.labels)


def rates(x: Tensor, y: Tensor, w: Tensor) -> list[float]:
    at: metrics.TarAtFar = metrics.tar_at_far(x, y, far=(0.1, 0.5))
    best: metrics.BestThreshold = metrics.best_threshold(x, y)
    gap: metrics.ThresholdGap = metrics.threshold_gap(x, y, 10.0, scale=64.0)
    histogram: metrics.PairHistogram = metrics.pair_histogram(x, y, bins=64)
    curve: metrics.ROC = metrics.roc(histogram)
    thresholds: metrics.IdentityThresholds = metrics.identity_thresholds(x, y)
    rank: Tensor = metrics.kth_largest_score(x, y, 1)
    classified: metrics.ClassificationAccuracy = metrics.classification_accuracy(x, w, y)
    found: metrics.Nearest = metrics.nearest(x, w, 2)
    print(curve, thresholds, classified, found.index)
    return [best.threshold, gap.gap, float(at.tar[0]), rank.item()]


def other_libraries(x: Tensor, y: Tensor) -> list[Tensor]:
    contrast = adapters.metric_learning.NTXentLoss(temperature=0.1)
    memory = adapters.metric_learning.CrossBatchMemory(contrast, D, memory_size=2 * N)
    loss = adapters.sup_contrast.SupConLoss()
    views = torch.stack([x, x.roll(1, 0)], dim=1)
    clip = adapters.open_clip.ClipLoss()
    ranking = adapters.sentence_transformers.MultipleNegativesRankingLoss(nn.Identity())
    results: list[Tensor] = [contrast(x, y), memory(x, y), loss(views, y), clip(x, x, 10.0)]
    return [*results, ranking.compute_loss_from_embeddings([x, x.roll(1, 0)])]


def main() -> None:
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D)
    y = torch.arange(N) % K
    for loss in functions(x, w, y, torch.tensor(5.0)):
        assert loss.isfinite().all()
    for module in [*class_modules(), *pair_modules()]:
        value: Tensor = module(x, y)
        assert value.isfinite()
    for towers in tower_modules():
        value = towers(x, x.roll(1, 0))
        assert value.isfinite()
    assert all(loss.isfinite() for loss in [memory(x, y), *other_libraries(x, y)])
    assert step(x.detach(), y) > 0
    assert len(rates(x.detach(), y, w)) == 4
    report = policy.check(Contrastive(), backends=["reference"], show=False)
    assert report.ok
    assert uk.resolve_backend("auto", "cpu", torch.float32) in ("native", "reference")
    print(uk.__version__)


if __name__ == "__main__":
    main()
