"""Numbers of a batch against class weights by which losses adapt, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, passes, validate
from ..backends import reference
from ..backends.streaming import CallConfig, CallTensors, make_call
from ..compiling import never_compiled
from ..losses import LossSpec
from .call import by_class, matmul_dtype
from .variables import Variables, packed


def check_batch(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    class_index: Tensor | None,
    centers: int = 1,
) -> None:
    """Arguments of a loss over classes, for what is computed of them before it."""
    validate.features("feats", feats)
    weight = by_class(weight, centers, feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    if class_index is not None:
        validate.class_index("class_index", class_index, weight)
    if not torch.compiler.is_compiling():
        targets = weight if class_index is None else class_index
        validate.in_range("labels", labels, -1, targets.shape[0])


@torch.no_grad()
def target_cosines(
    feats: Tensor, weight: Tensor, labels: Tensor, class_index: Tensor | None = None
) -> Tensor:
    """(N,) cosines of rows with their classes, 0 where a label is below 0; at least float32.

    ``weight``: (C, D), or (C, K, D) of several centers.
    """
    targets = weight if class_index is None else class_index
    dtype = torch.promote_types(feats.dtype, torch.float32)
    if targets.shape[0] == 0:
        return torch.zeros(labels.shape, dtype=dtype, device=feats.device)
    place = labels.to(torch.int64).clamp(0, targets.shape[0] - 1)
    if class_index is not None:
        place = class_index.to(torch.int64)[place]
    unit = reference.normalize_rows(feats.detach().to(dtype))
    own = weight.detach()[place].to(dtype)
    if own.dim() == 2:
        own = own[:, None]
    centers = reference.normalize_rows(own.flatten(0, 1)).view_as(own)
    cosines = (unit[:, None] * centers).sum(dim=2).amax(dim=1)
    return torch.where(labels >= 0, cosines, 0.0)


@never_compiled
@torch.no_grad()
def log_negatives(
    spec: LossSpec, variables: Variables, tensors: CallTensors, backend: str
) -> tuple[Tensor, Tensor]:
    """(N,) log-sum-exps of the logits of the rows' negatives, and cosines of their targets.

    From tiles, as the forward pass of the loss has them, but for the reference backend.

    Args:
        spec: a softmax over classes that reads variables, and has no other numbers.
        variables: of its formula.
        tensors: rows, labels, columns and their index, checked; a label of -2 is that of a row
            without a target, of which all columns are negatives.
    """
    rows = tensors.rows
    backend = dispatch.resolve(backend, rows.device, rows.dtype)
    given = packed(spec, variables, tensors)
    config = CallConfig(spec, (), "none", backend, matmul_dtype(rows))
    if backend == "reference":
        return _of_matrix(config, tensors._replace(variables=given))
    state = passes.forward(make_call(config, tensors._replace(variables=given)), False).state
    assert state is not None
    return state[0], state[3]


def _of_matrix(config: CallConfig, tensors: CallTensors) -> tuple[Tensor, Tensor]:
    rows, labels, columns, _, index, _, given = tensors
    assert columns is not None
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if index is not None:
        columns = columns[index.to(torch.int64)]
    cosines = reference.similarities(config.spec, rows.to(dtype), columns.to(dtype))
    positive = labels[:, None] == torch.arange(len(columns), device=rows.device)
    term = config.spec.negative
    assert term is not None
    assert given is not None
    logits = term(cosines, None, config.params, tuple(given.to(dtype)))
    logits = logits.masked_fill(positive, -torch.inf)
    return logits.logsumexp(dim=1), torch.where(positive, cosines, 0.0).sum(dim=1)
