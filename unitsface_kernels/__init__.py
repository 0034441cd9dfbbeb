"""Fused similarity losses for face recognition and metric learning.

Large batch-pair and sample-to-class cosine losses that never store the N x M matrix.
"""

from . import functional, modules, policy
from ._version import __version__
from .dispatch import resolve as resolve_backend
from .distributed.partial_fc import PartialFC, clip_grad_norm_
from .functional import (
    frequency_margins,
    fused_adaface_loss,
    fused_circle_loss,
    fused_class_loss,
    fused_class_margin_loss,
    fused_clip_loss,
    fused_contrastive_loss,
    fused_elasticface_loss,
    fused_info_nce_loss,
    fused_magface_loss,
    fused_margin_softmax_loss,
    fused_multi_similarity_loss,
    fused_npt_loss,
    fused_pair_bce_loss,
    fused_pair_logsumexp,
    fused_pair_loss,
    fused_pair_softmax_loss,
    fused_proxy_anchor_loss,
    fused_proxy_nca_loss,
    fused_siglip_loss,
    fused_simple_loss,
    fused_sphereface2_loss,
    fused_triplet_loss,
    fused_uce_loss,
    fused_uss_loss,
    uss_threshold_init,
)
from .memory import FeatureMemory
from .modules import (
    CLASS_LOSSES,
    PAIR_LOSSES,
    AdaFaceLoss,
    ArcFaceLoss,
    CircleLoss,
    ClassBCELoss,
    ClassLoss,
    ClassMarginLoss,
    CLIPLoss,
    ContrastiveLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    EPLLoss,
    InfoNCELoss,
    MagFaceLoss,
    MarginSoftmaxLoss,
    MultiSimilarityLoss,
    NormFaceLoss,
    NPTLoss,
    PairBCELoss,
    PairLoss,
    PairSoftmaxLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SigLIPLoss,
    SimPLELoss,
    SphereFace2Loss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
    TripletLoss,
    UCELoss,
    UniTSFaceLoss,
    UNPGLoss,
    USSLoss,
    VPLLoss,
)
from .optim import SampledAdamW, SampledSGD

__all__ = [
    "CLASS_LOSSES",
    "PAIR_LOSSES",
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CLIPLoss",
    "CircleLoss",
    "ClassBCELoss",
    "ClassLoss",
    "ClassMarginLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "EPLLoss",
    "ElasticFaceLoss",
    "FeatureMemory",
    "InfoNCELoss",
    "MagFaceLoss",
    "MarginSoftmaxLoss",
    "MultiSimilarityLoss",
    "NPTLoss",
    "NormFaceLoss",
    "PairBCELoss",
    "PairLoss",
    "PairSoftmaxLoss",
    "PartialFC",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SampledAdamW",
    "SampledSGD",
    "SigLIPLoss",
    "SimPLELoss",
    "SphereFace2Loss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "TripletLoss",
    "UCELoss",
    "UNPGLoss",
    "USSLoss",
    "UniTSFaceLoss",
    "VPLLoss",
    "__version__",
    "adapters",
    "clip_grad_norm_",
    "frequency_margins",
    "fused_adaface_loss",
    "fused_circle_loss",
    "fused_class_loss",
    "fused_class_margin_loss",
    "fused_clip_loss",
    "fused_contrastive_loss",
    "fused_elasticface_loss",
    "fused_info_nce_loss",
    "fused_magface_loss",
    "fused_margin_softmax_loss",
    "fused_multi_similarity_loss",
    "fused_npt_loss",
    "fused_pair_bce_loss",
    "fused_pair_logsumexp",
    "fused_pair_loss",
    "fused_pair_softmax_loss",
    "fused_proxy_anchor_loss",
    "fused_proxy_nca_loss",
    "fused_siglip_loss",
    "fused_simple_loss",
    "fused_sphereface2_loss",
    "fused_triplet_loss",
    "fused_uce_loss",
    "fused_uss_loss",
    "metrics",
    "policy",
    "resolve_backend",
    "uss_threshold_init",
]


# Functions and modules of losses that have none of their own.
_derived = {f.__name__: f for f in (*functional.DERIVED.values(), *modules.DERIVED.values())}
globals().update(_derived)
__all__ += _derived


def __getattr__(name: str) -> object:
    """``metrics`` and ``adapters`` are imported when first used: training does without them."""
    if name in ("adapters", "metrics", "partial_fc"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
