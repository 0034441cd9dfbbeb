"""AdaCos, a softmax over cosines whose scale is computed."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..losses import REGISTRY
from .call import class_loss


def fused_adacos_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Softmax cross-entropy over cosines at the scale that :class:`AdaCosLoss` computes.

    Source: Zhang et al., "AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep
    Face Representations", CVPR 2019.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0: a number, or a tensor of one element, which gets a gradient if it requires
            one, and is not read by the host.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get
            zero gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: as for :func:`fused_margin_softmax_loss`; no tile is left out.
        centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    if not isinstance(scale, Tensor):
        validate.number("scale", scale, above=0.0, kind="a float or a torch.Tensor")
    return class_loss(
        REGISTRY["adacos"],
        {},
        *(feats, weight, labels, None, class_index, reduction, backend, skip_tolerance),
        variables={"scale": scale},
        centers=centers,
    )
