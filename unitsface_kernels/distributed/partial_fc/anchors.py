"""Losses of classes over samples: a formula of pairs, whose rows are the classes of the shard and
whose columns are the samples of all ranks.

A class has its whole loss on the rank that holds it. Ranks exchange how many classes and pairs a
mean is taken of, and the sums of their losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backends.streaming import Call, CallConfig, CallTensors, Gradients, make_call
from ...losses import LossSpec
from ..collectives import Group, gather_numbers, host_device, world_size
from ..pairs import Exchange, Setting
from .shard import Shard


@dataclass(frozen=True)
class Anchors:
    """The classes of a step.

    Attributes:
        counts: classes that take part on every rank.
    """

    group: Group
    counts: Sequence[int]

    def call(self, config: CallConfig, tensors: CallTensors) -> Call:
        """The call of a pass.

        Args:
            config: needs gradients of rows for those of samples, of columns for those of classes.
            tensors: of samples over classes, as a loss of samples has them.
        """
        samples, positions, classes, *_ = tensors
        assert classes is not None
        if tensors.column_index is not None:
            classes = classes[tensors.column_index]
        config = replace(config, need_rows=config.need_columns, need_columns=config.need_rows)
        numbers = torch.arange(len(classes), device=classes.device)
        labels = torch.where(positions == -2, len(classes), positions)
        # Columns have to be finite, whether they take part or not.
        samples = torch.where((positions == -1)[:, None], 0.0, samples).to(samples.dtype)
        tensors = tensors._replace(
            rows=classes,
            row_labels=numbers,
            columns=samples,
            column_labels=labels,
            column_index=None,
        )
        call = make_call(config, tensors)
        if world_size(self.group) == 1:
            return call
        ranks = Exchange(call.rows, Setting(config, self.group, self.counts, ring=False))
        count = max(sum(self.counts), 1)
        ranks.num_valid_rows = torch.full((), count, dtype=torch.float32, device=samples.device)
        return replace(call, ranks=ranks)


def of_step(spec: LossSpec, shard: Shard, index: Tensor | None, group: Group) -> Anchors | None:
    """The classes of a step, if those of the loss have losses.

    ``index``: (K,) classes of this rank that take part; None: all do, on every rank.
    """
    if not _has_losses(spec):
        return None
    if index is not None:
        counts = gather_numbers([len(index)], host_device(group), group)[:, 0].tolist()
        return Anchors(group, counts)
    ranks = world_size(group)
    return Anchors(group, [len(Shard.of_rank(shard.num_classes, k, ranks)) for k in range(ranks)])


def _has_losses(spec: LossSpec) -> bool:
    """Whether classes have losses, over samples; else samples have, over classes."""
    return spec.topology == "pair"


def check_reduction(spec: LossSpec, reduction: str) -> None:
    if _has_losses(spec) and reduction == "none":
        raise ValueError(
            f'reduction must be "mean" or "sum" for {spec.name}, whose classes have the losses, '
            'got "none"'
        )


def check_fusion(spec: LossSpec) -> None:
    if _has_losses(spec):
        raise ValueError(
            "loss of a fused optimizer must be one of samples over classes, got "
            f"{spec.name}: the gradient of a class that has a loss is complete after all samples"
        )


def by_role(gradients: Gradients) -> Gradients:
    """Gradients with samples as rows and classes as columns, or the other way round."""
    return gradients._replace(rows=gradients.columns, columns=gradients.rows)
