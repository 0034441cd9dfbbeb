"""Modules with the learnable parameters of the losses. Formulas: see ``functional``."""

from __future__ import annotations

from torch import nn

from .. import functional
from ..losses import REGISTRY
from .adacos import AdaCosLoss
from .adaface import AdaFaceLoss
from .bce import ClassBCELoss, UCELoss
from .combined import UniTSFaceLoss
from .custom import ClassLoss, PairLoss
from .derived import module_of
from .elasticface import ElasticFaceLoss
from .epl import EPLLoss
from .hard_negatives import CurricularFaceLoss, MVSoftmaxLoss
from .margin_softmax import (
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from .margins import ClassMarginLoss, MagFaceLoss
from .metric import ContrastiveLoss, SimPLELoss, TripletLoss
from .npt import NPTLoss
from .pair import CircleLoss, MultiSimilarityLoss, PairBCELoss, PairSoftmaxLoss, USSLoss
from .proxies import ProxyAnchorLoss, ProxyNCALoss, SimPLEProxyLoss
from .sphereface2 import SphereFace2Loss
from .towers import CLIPLoss, InfoNCELoss, SigLIPLoss
from .unpg import UNPGLoss
from .vpl import VPLLoss

CLASS_LOSSES: dict[str, type[nn.Module]] = {
    "margin_softmax": MarginSoftmaxLoss,
    "normface": NormFaceLoss,
    "cosface": CosFaceLoss,
    "arcface": ArcFaceLoss,
    "sphereface": SphereFaceLoss,
    "subcenter_arcface": SubCenterArcFaceLoss,
    "uce": UCELoss,
    "class_bce": ClassBCELoss,
    "sphereface2": SphereFace2Loss,
    "npt": NPTLoss,
    "proxy_nca": ProxyNCALoss,
    "proxy_anchor": ProxyAnchorLoss,
    "simple_proxy": SimPLEProxyLoss,
    "epl": EPLLoss,
    "unpg": UNPGLoss,
    "vpl": VPLLoss,
    "adaface": AdaFaceLoss,
    "class_margin": ClassMarginLoss,
    "elasticface": ElasticFaceLoss,
    "magface": MagFaceLoss,
    "curricularface": CurricularFaceLoss,
    "mv_softmax": MVSoftmaxLoss,
    "adacos": AdaCosLoss,
}
PAIR_LOSSES: dict[str, type[nn.Module]] = {
    "uss": USSLoss,
    "pair_bce": PairBCELoss,
    "pair_softmax": PairSoftmaxLoss,
    "circle": CircleLoss,
    "multi_similarity": MultiSimilarityLoss,
    "contrastive": ContrastiveLoss,
    "batch_hard": TripletLoss,
    "simple": SimPLELoss,
}

__all__ = [
    "CLASS_LOSSES",
    "PAIR_LOSSES",
    "AdaCosLoss",
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CLIPLoss",
    "CircleLoss",
    "ClassBCELoss",
    "ClassLoss",
    "ClassMarginLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "EPLLoss",
    "ElasticFaceLoss",
    "InfoNCELoss",
    "MVSoftmaxLoss",
    "MagFaceLoss",
    "MarginSoftmaxLoss",
    "MultiSimilarityLoss",
    "NPTLoss",
    "NormFaceLoss",
    "PairBCELoss",
    "PairLoss",
    "PairSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SigLIPLoss",
    "SimPLELoss",
    "SimPLEProxyLoss",
    "SphereFace2Loss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "TripletLoss",
    "UCELoss",
    "UNPGLoss",
    "USSLoss",
    "UniTSFaceLoss",
    "VPLLoss",
]

#: Modules of losses that have none of their own, by the loss's name.
DERIVED = {name: module_of(REGISTRY[name]) for name in functional.DERIVED}
for _name, _cls in DERIVED.items():
    (CLASS_LOSSES if _cls.spec.topology == "class" else PAIR_LOSSES)[_name] = _cls
globals().update({cls.__name__: cls for cls in DERIVED.values()})
