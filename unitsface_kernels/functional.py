"""The functional API: names, defaults, documentation. Everything else happens further down."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, ops, validate
from .backends import reference
from .losses import REGISTRY, LossSpec


def fused_uss_loss(
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float = 64.0,
    margin: float = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Unified threshold integrated sample-to-sample loss (USS; with a margin USS-m).

    With cosines :math:`c_{ij}` of the rows of ``feats`` against the columns (the batch itself
    without the pair (i, i), or ``memory``) and :math:`\sigma^+(z) = \log(1 + e^z)`:

    .. math:: L_i = \sum_{j \in P(i)} \sigma^+(-(s (c_{ij} - m) - b))
                  + \sum_{j \in N(i)} \sigma^+(s\, c_{ij} - b)

    Source: Jia et al., "UniTSFace: Unified Threshold Integrated Sample-to-Sample Loss for Face
    Recognition", NeurIPS 2023, eq. 11 and, with the margin, eq. 24. The published code clamps
    logits to [-s, s]; this function does not.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalised; float64 with the
            reference backend.
        labels: (N,) integer identities; -1 ignores the row, and the column it is in the batch.
        b: threshold in logit units, a float (no gradient) or a one-element tensor. The unified
            cosine threshold is ``b / scale``.
        memory: (M, D) features to compare with instead of the batch; it gets a gradient only if
            it requires one.
        memory_labels: (M,) integer identities; -1 is neither positive nor negative.
        batch_offset: for a memory that holds the batch itself: the pair of row i and memory row
            i + batch_offset is left out. None: no pair is.
        scale: s > 0.
        margin: m, subtracted from the cosines of positive pairs.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return _pair_loss(
        REGISTRY["uss"],
        {"scale": scale, "margin": margin},
        feats,
        labels,
        b,
        memory,
        memory_labels,
        batch_offset,
        reduction,
        backend,
    )


def fused_margin_softmax_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.4,
    margin_gradient: str = "exact",
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Softmax cross-entropy over cosines with an additive or multiplicative margin.

    The target's cosine :math:`\cos\theta` becomes :math:`\cos(m_1\theta + m_2) - m_3`, continued
    as :math:`(-1)^k\cos(\cdot) - 2k` once the angle passes :math:`k\pi`; then softmax
    cross-entropy at scale s. NormFace is (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0),
    SphereFace-R (m, 0, 0).

    Source: Wang et al., "CosFace", CVPR 2018, eq. 4; Deng et al., "ArcFace", CVPR 2019, eq. 3
    and 4; Liu et al., "SphereFace Revived", TPAMI 2022.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalised; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalised.
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0.
        m1: factor of the target's angle, > 0.
        m2: added to the target's angle, in radians.
        m3: subtracted from the target's cosine.
        margin_gradient: "exact" differentiates the margin; "detached" takes its shift as a
            constant, as insightface's ArcFace and OpenSphere do.
        class_index: (K,) distinct integer rows of ``weight`` that take part (a sampled subset);
            the others get zero gradient. No copy of the sampled rows is made.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return _class_loss(
        REGISTRY["margin_softmax"],
        {"scale": scale, "m1": m1, "m2": m2, "m3": m3, "margin_gradient": margin_gradient},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
    )


def fused_pair_softmax_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float = 64.0,
    margin: float = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Softmax of each positive of a row against all negatives of the row.

    .. math:: L_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} -\log
        \frac{e^{s (c_{ip} - m)}}{e^{s (c_{ip} - m)} + \sum_{j \in N(i)} e^{s c_{ij}}}

    Known as soft-m in UniTSFace; with s = 1, m = 0 the (N+1)-tuplet or multi-class N-pair loss on
    cosines. Positives of a row do not compete with each other.

    Source: Jia et al., "UniTSFace", NeurIPS 2023, eq. 17; Sohn, "Improved Deep Metric Learning
    with Multi-class N-pair Loss Objective", NIPS 2016, eq. 6.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend: as of :func:`fused_uss_loss`.
        scale: s > 0.
        margin: m, subtracted from the cosines of positive pairs.
        reduction: "mean" over the rows that have a positive, "sum", or "none" for (N,) with 0
            at rows that have none or are ignored.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return _pair_loss(
        REGISTRY["pair_softmax"],
        {"scale": scale, "margin": margin},
        feats,
        labels,
        None,
        memory,
        memory_labels,
        batch_offset,
        reduction,
        backend,
    )


def fused_pair_logsumexp(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float = 64.0,
    lower: float = -2.0,
    upper: float = 2.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Log-sum-exp of every row's negatives, :math:`\log \sum_{j \in N(i)} e^{s c_{ij}}`.

    The soft maximum, at scale s, of the cosines between a row and other identities.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend: as of :func:`fused_uss_loss`.
        scale: s > 0.
        lower, upper: negatives whose cosine lies outside are left out. A row that has negatives,
            none of which lies inside, has the value -inf and no gradient.
        reduction: "mean" over the rows that have a negative, "sum", or "none" for (N,) with 0
            at rows that have none or are ignored.

    Returns:
        float32 (float64 for float64 features) value, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return _pair_loss(
        REGISTRY["pair_logsumexp"],
        {"scale": scale, "lower": lower, "upper": upper},
        feats,
        labels,
        None,
        memory,
        memory_labels,
        batch_offset,
        reduction,
        backend,
    )


@torch.no_grad()
def uss_threshold_init(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float = 64.0,
    backend: str = "auto",
) -> Tensor:
    r"""First value of the USS threshold, as UniTSFace's published code takes it from a batch.

    .. math:: b_0 = \mathrm{mean}_i \log \sum_{j \in N(i)} e^{s c_{ij}}

    The mean is over the rows that have a negative.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend: as of :func:`fused_uss_loss`.
        scale: s > 0, the one of the loss.

    Returns:
        () float32 (float64 for float64 features) threshold in logit units, without gradient.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return fused_pair_logsumexp(
        feats,
        labels,
        memory=memory,
        memory_labels=memory_labels,
        batch_offset=batch_offset,
        scale=scale,
        backend=backend,
    )


def _pair_loss(
    spec: LossSpec,
    values: dict[str, float | str],
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
    batch_offset: int | None,
    reduction: str,
    backend: str,
) -> Tensor:
    validate.features("feats", feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    validate.memory_pair(memory, memory_labels, batch_offset)
    if memory is not None and memory_labels is not None:
        validate.features("memory", memory, like=feats)
        validate.labels("memory_labels", memory_labels, memory.shape[0], feats, counted="memory")
    identities = None
    if spec.threshold == "per_column":
        validate.threshold("b", b, feats, per="identity")
        if isinstance(b, Tensor):
            identities = b.shape[0]
    columns = (memory, memory_labels, None, batch_offset if memory is not None else 0)
    return _similarity_loss(spec, values, feats, labels, columns, b, identities, reduction, backend)


def _class_loss(
    spec: LossSpec,
    values: dict[str, float | str],
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    class_index: Tensor | None,
    reduction: str,
    backend: str,
) -> Tensor:
    validate.features("feats", feats)
    validate.features("weight", weight, like=feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    if class_index is not None:
        validate.class_index("class_index", class_index, weight)
    if spec.threshold == "per_column":
        validate.threshold("b", b, feats, per="class", size=weight.shape[0])
    columns = (weight, None, class_index, None)
    return _similarity_loss(spec, values, feats, labels, columns, b, None, reduction, backend)


def _similarity_loss(
    spec, values, feats, labels, column_arguments, b, identities, reduction, backend
) -> Tensor:
    columns, column_labels, column_index, self_offset = column_arguments
    validate.parameters(spec, values)
    validate.choice("reduction", reduction, validate.REDUCTIONS)
    if spec.threshold == "scalar":
        validate.threshold("b", b, feats)
    backend = dispatch.resolve(backend, feats.device.type, feats.dtype)
    params = spec.pack(values)
    # torch.compile cannot branch on data; there the operator itself guards its memory accesses.
    if not torch.compiler.is_compiling():
        validate.call_labels(spec, labels, columns, column_labels, column_index, identities)
    threshold = _threshold(spec, b, feats, labels, columns, column_labels, column_index)
    if backend == "reference":
        return reference.similarity_loss(
            spec,
            params,
            feats,
            labels,
            columns,
            column_labels,
            column_index,
            self_offset,
            threshold,
            reduction,
        )
    _refuse_transforms(feats, columns, threshold)
    device_type = feats.device.type
    compute_dtype = feats.dtype
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    differentiable = torch.is_grad_enabled()

    def needed(tensor: Tensor | None) -> bool:
        return differentiable and tensor is not None and tensor.requires_grad

    loss, *_ = ops.similarity_loss(
        feats,
        labels,
        columns,
        column_labels,
        column_index,
        self_offset,
        threshold,
        spec.name,
        list(params),
        reduction,
        backend,
        compute_dtype,
        needed(feats),
        needed(columns),
        needed(threshold),
    )
    return loss


def _threshold(
    spec: LossSpec,
    b: float | Tensor | None,
    feats: Tensor,
    labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
) -> Tensor | None:
    """The threshold as operators take it: one number, or one per column."""
    if b is None:
        return None
    if spec.threshold == "scalar":
        if isinstance(b, Tensor):
            return b
        return torch.full((), float(b), dtype=torch.float32, device=feats.device)
    count = (feats if columns is None else columns).shape[0]
    if not isinstance(b, Tensor):
        if column_index is not None:
            count = column_index.shape[0]
        return torch.full((count,), float(b), dtype=torch.float32, device=feats.device)
    # Indexing, whose backward pass is deterministic on every device.
    if spec.topology == "class":
        return b if column_index is None else b[column_index.to(torch.int64)]
    identity = labels if column_labels is None else column_labels
    return b[identity.to(torch.int64).clamp(min=0)]


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """torch.func and forward-mode tangents would be dropped silently by the operator."""
    if torch.compiler.is_compiling():
        return
    dual = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused losses run neither under torch.func transforms (grad, vmap, jvp, ...) nor "
            'with forward-mode differentiation; use backend="reference" for those'
        )
