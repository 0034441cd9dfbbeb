"""A loss over pairs, of the own batch or across the ranks of a process group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..compiling import never_compiled
from ..distributed import pairs
from ..distributed.agreement import agree, checksum, same_on_device
from ..distributed.collectives import Group, own_rank, start_gather_rows, world_size
from ..distributed.pairs.exchange import EXCHANGES
from ..losses import LossSpec
from . import call


def pair_loss(
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
    skip_tolerance: float = 0.0,
    *,
    group: Group,
    exchange: str,
) -> Tensor:
    batch = (feats, labels, b, memory, memory_labels, batch_offset)
    settings = (reduction, backend, skip_tolerance)
    if group is not None:
        return _across_ranks(spec, values, batch, settings, group, exchange)
    validate.choice("exchange", exchange, EXCHANGES)
    return call.pair_loss(spec, values, *batch, *settings)


# Collectives, and their sizes, depend on what other ranks have.
@never_compiled
def _across_ranks(spec, values, batch, settings, group, exchange) -> Tensor:
    validate.process_group("group", group)
    if world_size(group) == 1:
        validate.choice("exchange", exchange, EXCHANGES)
        return call.pair_loss(spec, values, *batch, *settings)
    feats, labels, b, memory, memory_labels, batch_offset = batch
    reduction, backend, skip_tolerance = settings

    def check():
        identities = call.check_pairs(spec, *batch)
        chosen, params = call.check_settings(
            spec, values, feats, b, reduction, backend, skip_tolerance
        )
        validate.choice("exchange", exchange, EXCHANGES)
        validate.call_labels(spec, labels, memory, memory_labels, None, identities)
        if chosen != "reference":
            call.refuse_transforms(feats, memory, b if isinstance(b, Tensor) else None)
        compared = {
            "memory": memory,
            "memory_labels": memory_labels,
            "b": b if isinstance(b, Tensor) else None,
        }
        held = {name: tensor for name, tensor in compared.items() if tensor is not None}
        sums = {}
        if not feats.is_cuda:
            sums = {f"the checksum of {name}": checksum(t).item() for name, t in held.items()}
        needs = tuple(_needs_gradient(tensor) for tensor in (feats, memory, b))
        same = {
            "the loss": spec.name,
            **values,
            "reduction": reduction,
            "backend": chosen,
            "skip_tolerance": skip_tolerance,
            "exchange": exchange,
            "D": feats.shape[1],
            "the dtype of feats": feats.dtype,
            "the dtype of products": call.product_dtype(feats),
            "b": _described(b),
            "memory": _described(memory),
            "whether feats, memory and b need a gradient": needs,
            **sums,
        }
        return (chosen, params, needs, held), feats.shape[0], same

    (backend, params, needs, held), counts = agree(check, group)
    if feats.is_cuda and held:
        same_on_device(held, group)
    labels = labels.to(torch.int64)
    self_offset = batch_offset
    column_labels = memory_labels
    if memory is None:
        self_offset = sum(counts[: own_rank(group)])
        column_labels = start_gather_rows(labels, counts, group)()
    assert column_labels is not None
    column_labels = column_labels.to(torch.int64)
    if backend == "reference":
        memory, b = (pairs.replica(t, group) if isinstance(t, Tensor) else t for t in (memory, b))
    threshold = call.threshold_of_columns(spec, b, feats, labels, memory, column_labels, None)
    if backend == "reference":
        return pairs.eager_loss(
            spec,
            params,
            feats,
            labels,
            memory,
            column_labels,
            self_offset,
            threshold,
            reduction,
            counts,
            group,
        )
    setting = pairs.Setting(
        spec,
        params,
        reduction,
        call.product_dtype(feats),
        float(skip_tolerance),
        self_offset,
        backend,
        needs,
        group,
        counts,
        pairs.takes_ring(exchange, counts, feats),
    )
    return pairs.fused_loss(setting, feats, labels, memory, column_labels, threshold)


def _needs_gradient(value: object) -> bool:
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad


def _described(value: float | Tensor | None) -> str:
    """What has to be the same on every rank and can be known without reading a tensor."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return str(value)
