"""The functional API: names, signatures and documentation of the losses."""

from ..losses import REGISTRY
from .adacos import fused_adacos_loss
from .classes import (
    fused_margin_softmax_loss,
    fused_npt_loss,
    fused_sphereface2_loss,
    fused_uce_loss,
)
from .custom import fused_class_loss, fused_pair_loss
from .derived import public_function
from .hard_negatives import fused_curricularface_loss, fused_mv_softmax_loss
from .margins import (
    frequency_margins,
    fused_adaface_loss,
    fused_class_margin_loss,
    fused_elasticface_loss,
    fused_magface_loss,
)
from .metric import fused_contrastive_loss, fused_simple_loss, fused_triplet_loss
from .pair import (
    fused_circle_loss,
    fused_multi_similarity_loss,
    fused_pair_bce_loss,
    fused_pair_logsumexp,
    fused_pair_softmax_loss,
    fused_uss_loss,
    uss_threshold_init,
)
from .proxies import fused_proxy_anchor_loss, fused_proxy_nca_loss, fused_simple_proxy_loss
from .towers import fused_clip_loss, fused_info_nce_loss, fused_siglip_loss
from .unpg import fused_unpg_loss

__all__ = [
    "frequency_margins",
    "fused_adacos_loss",
    "fused_adaface_loss",
    "fused_circle_loss",
    "fused_class_loss",
    "fused_class_margin_loss",
    "fused_clip_loss",
    "fused_contrastive_loss",
    "fused_curricularface_loss",
    "fused_elasticface_loss",
    "fused_info_nce_loss",
    "fused_magface_loss",
    "fused_margin_softmax_loss",
    "fused_multi_similarity_loss",
    "fused_mv_softmax_loss",
    "fused_npt_loss",
    "fused_pair_bce_loss",
    "fused_pair_logsumexp",
    "fused_pair_loss",
    "fused_pair_softmax_loss",
    "fused_proxy_anchor_loss",
    "fused_proxy_nca_loss",
    "fused_siglip_loss",
    "fused_simple_loss",
    "fused_simple_proxy_loss",
    "fused_sphereface2_loss",
    "fused_triplet_loss",
    "fused_uce_loss",
    "fused_unpg_loss",
    "fused_uss_loss",
    "uss_threshold_init",
]

#: Functions of losses that have none of their own, by the loss's name.
DERIVED = {
    spec.name: public_function(spec) for spec in REGISTRY.values() if spec.function not in __all__
}
globals().update({function.__name__: function for function in DERIVED.values()})
