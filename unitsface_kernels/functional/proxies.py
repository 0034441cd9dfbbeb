"""Losses of metric learning with proxies, one per class."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..distributed import pairs
from ..distributed.agreement import agree, checksums, same_on_device
from ..distributed.collectives import Group, own_rank, start_gather_rows, world_size
from ..losses import REGISTRY, TOWERS
from .call import Options, Samples, Values, class_loss
from .ranks import pair_loss
from .statistics import check_batch

_PROXY_NCA = REGISTRY["proxy_nca"].default
_PROXY_ANCHOR, _SIMPLE = (TOWERS[name].default for name in ("proxy_anchor", "simple_proxy"))


def fused_proxy_nca_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = _PROXY_NCA.scale,
    denominator: str = _PROXY_NCA.denominator,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Proxy-NCA: the squared distance to the own proxy against those to all others.

    With unit vectors, :math:`d_{ij} = \lVert \hat x_i - \hat w_j \rVert^2 = 2 - 2 c_{ij}` and y the
    row's class:

    .. math:: L_i = s\, d_{iy} + \log \sum_{j \neq y} e^{-s\, d_{ij}}

    With ``denominator="all"`` the sum includes y (ProxyNCA++), which makes it a softmax
    cross-entropy. A row without another class has the loss 0 with "negatives" as well.

    Source: Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017,
    eq. 4; Teh et al., "ProxyNCA++", ECCV 2020, eq. 6.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) proxies, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0, one over the temperature: 1 in Proxy-NCA's paper, 9 in ProxyNCA++.
        denominator: "negatives" or "all".
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get zero
            gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance, centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["proxy_nca"],
        {"scale": scale, "denominator": denominator},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        centers=centers,
    )


def fused_proxy_anchor_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float = _PROXY_ANCHOR.alpha,
    margin: float = _PROXY_ANCHOR.margin,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    r"""Proxy-Anchor: every proxy against its own samples of a batch and against all others.

    With the samples :math:`X_c^+` of class c in the batch, all others :math:`X_c^-`, C proxies and
    :math:`C^+` that have samples in the batch,

    .. math:: L = \frac{1}{C^+} \sum_c \log\Big(1 + \sum_{x \in X_c^+}
                  e^{-\alpha (c_{xc} - \delta)}\Big)
                  + \frac1C \sum_c \log\Big(1 + \sum_{x \in X_c^-} e^{\alpha (c_{xc} + \delta)}\Big)

    Source: Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, eq. 4.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) proxies, not normalized; unit vectors of all are kept for the call.
        labels: (N,) integer classes in [0, C); -1 ignores the sample. With ``class_index``:
            positions in it.
        alpha: > 0.
        margin: delta.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get zero
            gradient.
        reduction: "mean" as above, "sum" for C times that, or "none" for (C,), or (K,), losses of
            the proxies.
        backend: "auto", "native", "triton" or "reference".
        group: process group whose ranks have a part of the batch each and the same proxies, which
            are compared as a memory of :func:`fused_uss_loss` is; the loss is that of one process
            with the whole batch, and each rank compares a part of the proxies, of which alone it
            has the gradient, times the number of ranks: the ranks' gradients have to be averaged.
            Only with "mean" or "sum". None: this process has everything.

    Returns:
        float32 (float64 for float64 features) loss, () or (C,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    values: Values = {"alpha": alpha, "margin": margin}

    def check() -> None:
        validate.features("feats", feats)
        validate.features("weight", weight, like=feats)
        check_batch(feats, weight, labels, class_index)
        if group is not None and reduction == "none":
            raise ValueError(f'reduction must be "mean" or "sum" with a group, got {reduction!r}')

    validate.process_group("group", group)
    across = group is not None and world_size(group) > 1
    if across:
        given = {"weight": weight, "class_index": class_index}
        held = {name: tensor for name, tensor in given.items() if tensor is not None}

        def checked() -> tuple[bool, int, dict[str, object]]:
            check()
            same: dict[str, object] = {
                "D": feats.shape[1],
                "the dtype of feats": feats.dtype,
                **{f"the shape of {name}": tuple(t.shape) for name, t in held.items()},
                **checksums(held),
            }
            return True, feats.shape[0], same

        _, counts = agree(checked, group)
        if feats.is_cuda:
            same_on_device(held, group)
    else:
        check()
    proxies = weight if class_index is None else weight[class_index.to(torch.int64)]
    identities = torch.arange(len(proxies), device=feats.device)
    labels = labels.to(torch.int64)
    # Columns of a memory have to be finite, whether they take part or not.
    feats = torch.where((labels == -1)[:, None], 0.0, feats).to(feats.dtype)
    if across:
        feats = pairs.gathered(feats, counts, group)
        labels = start_gather_rows(labels, counts, group)()
        size = world_size(group)
        own = identities.tensor_split(size)[own_rank(group)]
        proxies, identities = proxies[own], own
    samples = Samples(proxies, identities, None, feats, labels, None)
    options = Options(reduction, backend)
    ranks = group if across else None
    return pair_loss(TOWERS["proxy_anchor"], values, samples, options, ranks, "auto")


def fused_simple_proxy_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    b_theta: float | Tensor = _SIMPLE.b_theta,
    alpha: float | Tensor = _SIMPLE.alpha,
    r: float | Tensor = _SIMPLE.r,
    margin: float | Tensor = _SIMPLE.margin,
    loss_weight: float | Tensor = _SIMPLE.loss_weight,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
) -> Tensor:
    r"""SimPLE of samples with proxies: :func:`fused_simple_loss`, whose formula and numbers these
    are, with class weights in place of the other samples.

    A sample and the weight of its class are a positive pair, and those of all other classes that
    take part negative ones; both kinds are averaged apart, over all samples. The published loss
    compares samples with samples alone.

    Source: Wen et al., "Pairwise Similarity Learning is SimPLE", ICCV 2023 (arXiv 2310.09449).

    Args:
        feats: (N, D) float32 or bfloat16 features, whose norms matter; float16 on the CPU, float64
            with the reference backend.
        weight: (C, D) class weights, whose norms matter. One vector of each class: a score reads
            its norm.
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        b, b_theta, alpha, r, margin, loss_weight, skip_tolerance: as of :func:`fused_simple_loss`.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get zero
            gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0 at
            ignored rows.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    values: Values = {"b_theta": b_theta, "alpha": alpha, "r": r}
    return class_loss(
        TOWERS["simple_proxy"],
        {**values, "margin": margin, "loss_weight": loss_weight},
        *(feats, weight, labels, b, class_index, reduction, backend, skip_tolerance),
    )
