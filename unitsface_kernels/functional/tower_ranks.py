"""A loss between two towers, of which every rank of a process group has its own rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import validate
from ..backends.streaming import CallConfig, CallTensors
from ..compiling import never_compiled
from ..distributed import pairs
from ..distributed.agreement import agree, checksums, same_on_device
from ..distributed.collectives import (
    Group,
    gather_numbers,
    host_device,
    own_rank,
    start_gather_rows,
    world_size,
)
from ..distributed.pairs.exchange import EXCHANGES
from ..losses import LossSpec
from . import call
from .call import Options, Samples
from .variables import needs_gradient, packed, with_gradient


@dataclass(frozen=True)
class Places:
    """The ranks' parts of both towers.

    Attributes:
        group: the ranks; None: this process has everything.
        rows, columns: how many every rank has.
    """

    group: Group
    rows: list[int]
    columns: list[int]

    @property
    def starts(self) -> tuple[int, int]:
        """Places of the own rows and columns among those of all ranks."""
        before = own_rank(self.group) if self.group is not None else 0
        return sum(self.rows[:before]), sum(self.columns[:before])

    def takes_ring(self, exchange: str, like: Tensor) -> bool:
        """Whether features as ``like`` are passed around, the same on every rank."""
        total = [r + c for r, c in zip(self.rows, self.columns, strict=True)]
        return self.group is not None and pairs.takes_ring(exchange, total, like)

    def gathered(self, values: Tensor, counts: list[int]) -> Tensor:
        """The values of all ranks, with their graph."""
        if self.group is None:
            return values
        if values.is_floating_point():
            return pairs.gathered(values, counts, self.group)
        return start_gather_rows(values, counts, self.group)()


def matched_by_place(where: Places, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels of own rows and columns: the i-th of a rank match, further columns match none."""
    (rows, columns), rank = where.starts, own_rank(where.group) if where.group is not None else 0
    count, others = where.rows[rank], where.columns[rank] - where.rows[rank]
    own = torch.arange(rows, rows + count, device=device)
    # Behind the labels of all rows.
    first = sum(where.rows) + columns - rows
    return own, torch.cat([own, torch.arange(first, first + others, device=device)])


def places(
    check: Callable[[], object],
    a: Tensor,
    b: Tensor,
    group: Group,
    exchange: str,
    same: dict[str, object] | None = None,
) -> Places:
    """What every rank has; ``check`` raises for the arguments of this rank, on all ranks.

    ``same``: what decides which collectives follow, and so has to be the same on every rank.
    """
    validate.process_group("group", group)
    if group is None or world_size(group) == 1:
        check()
        validate.choice("exchange", exchange, EXCHANGES)
        return Places(None, [a.shape[0]], [b.shape[0]])

    def checked() -> tuple[bool, int, dict[str, object]]:
        check()
        validate.choice("exchange", exchange, EXCHANGES)
        of_towers = {"exchange": exchange, "D": a.shape[1], "dtype": a.dtype}
        return True, a.shape[0], {**of_towers, **(same or {})}

    _, rows = agree(checked, group)
    columns = gather_numbers([b.shape[0]], host_device(group), group)[:, 0].tolist()
    return Places(group, rows, columns)


def tower_loss(
    spec: LossSpec, samples: Samples, options: Options, where: Places, exchange: str
) -> Tensor:
    """The loss of a pass over both directions, as of ``ranks.pair_loss``; labels are those of all.

    Across ranks pairs always count in both directions.
    """
    if where.group is None:
        config, tensors = call.pair_call(spec, {}, samples, options)
        return call.runner(config, tensors)(config, *tensors)
    return _across_ranks(spec, samples, options, where, exchange)


# Collectives, and their sizes, depend on what other ranks have.
@never_compiled
def _across_ranks(
    spec: LossSpec, samples: Samples, options: Options, where: Places, exchange: str
) -> Tensor:
    (config, held), _ = agree(partial(_check, spec, samples, options), where.group)
    rows, labels, b, columns, column_labels, *_ = samples
    assert columns is not None
    assert column_labels is not None
    if rows.is_cuda and held:
        same_on_device(held, where.group)
    group, variables = where.group, dict(options.variables or {})
    eager = config.backend == "reference"
    if eager:
        b = pairs.replicated(b, group) if isinstance(b, Tensor) else b
        for name, value in variables.items():
            if isinstance(value, Tensor):
                variables[name] = pairs.replicated(value, group)
    tensors = CallTensors(rows, labels, columns, column_labels)
    tensors = tensors._replace(
        threshold=call.threshold_of_columns(spec, b, tensors),
        variables=packed(spec, variables, tensors),
    )
    ring = where.takes_ring(exchange, rows)
    setting = pairs.Setting(replace(config, both=True), group, where.rows, ring, where.columns)
    return (pairs.eager_loss if eager else pairs.fused_loss)(setting, tensors)


def _check(
    spec: LossSpec, samples: Samples, options: Options
) -> tuple[tuple[CallConfig, dict[str, Tensor]], int, dict[str, object]]:
    """Checks the call of this rank; see :func:`agree`."""
    rows, b, columns = samples.feats, samples.b, samples.memory
    call.check_samples(spec, samples)
    backend, params = call.check_options(spec, {}, rows, b, options)
    shared = {"b": b, **(options.variables or {})}
    held = {name: value for name, value in shared.items() if isinstance(value, Tensor)}
    if backend != "reference":
        call.refuse_transforms(rows, columns, *held.values())
    variables = packed(spec, options.variables, samples.tensors())
    needs = tuple(needs_gradient(value) for value in (rows, columns, b, variables))
    dtype = call.matmul_dtype(rows)
    config = CallConfig(spec, params, options.reduction, backend, dtype, None, 0.0, *needs)
    same: dict[str, object] = {
        "the loss": spec.name,
        "reduction": options.reduction,
        "backend": backend,
        "the dtype of products": dtype,
        "whether towers and b need a gradient": needs[:3],
        "which variables need a gradient": with_gradient(spec, options.variables),
        **{name: value for name, value in shared.items() if not isinstance(value, Tensor)},
        **checksums(held),
    }
    return (config, held), rows.shape[0], same
