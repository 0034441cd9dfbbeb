"""A loss over pairs, of the own batch or across the ranks of a process group."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import validate
from ..backends.streaming import CallConfig, CallTensors
from ..compiling import never_compiled
from ..distributed import pairs
from ..distributed.agreement import agree, checksums, same_on_device
from ..distributed.collectives import Group, own_rank, start_gather_rows, world_size
from ..distributed.pairs.exchange import EXCHANGES
from ..losses import LossSpec
from . import call
from .call import Options, Samples
from .numbers import Values, apart
from .variables import (
    Variables,
    most_identities,
    needs_gradient,
    packed,
    with_gradient,
)

# What ``agree`` exchanges: config without an offset, tensors compared on the device, and variables;
# number of rows; arguments that have to be the same on every rank.
_Checked = tuple[tuple[CallConfig, dict[str, Tensor], Variables], int, dict[str, object]]


def pair_loss(
    spec: LossSpec,
    values: Values,
    samples: Samples,
    options: Options,
    group: Group,
    exchange: str,
) -> Tensor:
    if group is not None:
        return _across_ranks(spec, values, samples, options, group, exchange)
    validate.choice("exchange", exchange, EXCHANGES)
    config, tensors = call.pair_call(spec, values, samples, options)
    return call.runner(config, tensors)(config, *tensors)


# Collectives, and their sizes, depend on what other ranks have.
@never_compiled
def _across_ranks(
    spec: LossSpec,
    values: Values,
    samples: Samples,
    options: Options,
    group: Group,
    exchange: str,
) -> Tensor:
    validate.process_group("group", group)
    if world_size(group) == 1:
        return pair_loss(spec, values, samples, options, None, exchange)
    check = partial(_check, spec, values, samples, options, exchange)
    (config, held, variables), counts = agree(check, group)
    feats, labels, b, memory, column_labels, self_offset, _ = samples
    if feats.is_cuda and held:
        same_on_device(held, group)
    labels = labels.to(torch.int64)
    if memory is None:
        self_offset = sum(counts[: own_rank(group)])
        column_labels = start_gather_rows(labels, counts, group)()
    assert column_labels is not None
    column_labels = column_labels.to(torch.int64)
    eager = config.backend == "reference"
    if eager:
        if memory is not None:
            memory = pairs.replicated(memory, group)
        b = pairs.replicated(b, group) if isinstance(b, Tensor) else b
    tensors = CallTensors(feats, labels, memory, column_labels)
    tensors = tensors._replace(threshold=call.threshold_of_columns(config.spec, b, tensors))
    ring = pairs.takes_ring(exchange, counts, feats)
    setting = pairs.Setting(replace(config, self_offset=self_offset), group, counts, ring)
    if config.spec.variables:
        tensors = tensors._replace(variables=_variables(setting, variables, tensors))
    return (pairs.eager_loss if eager else pairs.fused_loss)(setting, tensors)


def _variables(setting: pairs.Setting, variables: Variables, tensors: CallTensors) -> Tensor | None:
    """``CallTensors.variables``; in a batch the variables of all ranks' rows and columns."""
    spec, given = setting.config.spec, dict(variables)
    counts, group, eager = setting.counts, setting.group, setting.config.backend == "reference"
    rows = {v.name for v in spec.variables if v.side == "row"}
    in_batch = tensors.columns is None
    own = rows | {v.name for v in spec.variables if in_batch and v.kind == "column"}
    if eager:
        for name, value in given.items():
            if name not in own and isinstance(value, Tensor):
                given[name] = pairs.replicated(value, group)
    gathers = {}
    if in_batch:
        gathered = partial(pairs.gathered, counts=counts, group=group)
        gathers = {"column": gathered} if eager else {"row": gathered, "column": gathered}
    return packed(spec, given, tensors, gathers)


def _check(
    spec: LossSpec, values: Values, samples: Samples, options: Options, exchange: str
) -> _Checked:
    """Checks the call of this rank; see :func:`agree`."""
    feats, labels, b, memory, memory_labels, *_ = samples
    identities = call.check_samples(spec, samples)
    spec, values, variables = apart(spec, values, options.variables, feats)
    given = variables or {}
    backend, params = call.check_options(spec, values, feats, b, options)
    validate.choice("exchange", exchange, EXCHANGES)
    identities = most_identities(spec, given, identities)
    validate.call_labels(spec, labels, memory, memory_labels, None, identities)
    # Each rank has the rows and, in a batch, the columns of its own.
    shared = {v.name: given.get(v.name) for v in spec.variables if v.kind in ("scalar", "identity")}
    compared = {"memory": memory, "memory_labels": memory_labels, "b": b, **shared}
    held = {name: value for name, value in compared.items() if isinstance(value, Tensor)}
    if backend != "reference":
        call.refuse_transforms(feats, memory, held.get("b"))
    of_call = packed(spec, given, samples.tensors())
    needs = tuple(needs_gradient(value) for value in (feats, memory, b, of_call))
    config = CallConfig(
        spec,
        params,
        options.reduction,
        backend,
        call.matmul_dtype(feats),
        None,
        float(options.skip_tolerance),
        *needs,
    )
    same: dict[str, object] = {
        "the loss": spec.name,
        **values,
        "reduction": options.reduction,
        "backend": backend,
        "skip_tolerance": options.skip_tolerance,
        "exchange": exchange,
        "D": feats.shape[1],
        "the dtype of feats": feats.dtype,
        "the dtype of products": config.compute_dtype,
        "b": _described(b),
        "memory": _described(memory),
        "whether feats, memory and b need a gradient": needs[:3],
        # Each is exchanged, or not, in the backward pass.
        "which variables need a gradient": with_gradient(spec, given),
        **{name: _described(value) for name, value in shared.items()},
        **checksums(held),
    }
    return (config, held, given), feats.shape[0], same


def _described(value: float | Tensor | None) -> str:
    """The part of an argument that must agree on all ranks, without reading tensor values."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return str(value)
