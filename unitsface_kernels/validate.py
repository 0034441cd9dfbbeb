"""Every check of what a user passes; the only place that raises for user mistakes."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .losses import LossSpec

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def features(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """A floating (rows, D) matrix, with the width and on the device of ``like``."""
    is_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, D), got {tuple(value.shape)}")
    if value.dtype not in FEATURE_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in FEATURE_DTYPES)
        raise TypeError(f"{name} must have dtype {expected}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have D >= 1 columns, got shape {tuple(value.shape)}")
    if like is not None:
        if value.shape[1] != like.shape[1]:
            raise ValueError(
                f"{name} must have D = {like.shape[1]} columns like feats, "
                f"got shape {tuple(value.shape)}"
            )
        same_device("feats", like, name, value)
        if (value.dtype == torch.float64) != (like.dtype == torch.float64):
            raise TypeError(
                f"{name} and feats must both be float64 or neither, "
                f"got {value.dtype} and {like.dtype}"
            )


def same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{second} must be on the device of {first} ({a.device}), got {b.device}")


def labels(name: str, value: Tensor, count: int, like: Tensor, counted: str = "feats") -> None:
    """An integer vector with one entry per row of ``counted``."""
    is_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != count:
        raise ValueError(
            f"{name} must have shape ({count},), one label per row of {counted}, "
            f"got {tuple(value.shape)}"
        )
    same_device("feats", like, name, value)


def class_index(name: str, value: Tensor, weight: Tensor) -> None:
    """An integer vector of rows of ``weight``; its range is checked with the labels'."""
    is_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have shape (K,), got {tuple(value.shape)}")
    same_device("weight", weight, name, value)


def threshold(
    name: str, value: object, like: Tensor, per: str | None = None, size: int | None = None
) -> None:
    """A float or a one-element tensor; with ``per`` a float or a vector, of ``size`` if given."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a float or a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {value.dtype}")
        shape = tuple(value.shape)
        if per is None and value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {shape}")
        if per is not None and (value.dim() != 1 or (size is not None and shape != (size,))):
            expected = "K" if size is None else size
            raise ValueError(f"{name} must have shape ({expected},), one per {per}, got {shape}")
        same_device("feats", like, name, value)
    elif not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def parameters(spec: LossSpec, values: dict[str, float | str]) -> None:
    """Scalar hyper-parameters: finite numbers within their bounds, known words."""
    for parameter in spec.parameters:
        value = values[parameter.name]
        if parameter.choices:
            choice(parameter.name, value, parameter.choices)
            continue
        if parameter.integer:
            is_int(parameter.name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{parameter.name} must be a float, got {type(value).__name__}")
        if not abs(value) < math.inf:
            raise ValueError(f"{parameter.name} must be finite, got {value}")
        if parameter.minimum is not None and value <= parameter.minimum:
            raise ValueError(f"{parameter.name} must be > {parameter.minimum:g}, got {value}")
        if parameter.at_least is not None and value < parameter.at_least:
            raise ValueError(f"{parameter.name} must be >= {parameter.at_least:g}, got {value}")
        if parameter.maximum is not None and value > parameter.maximum:
            raise ValueError(f"{parameter.name} must be <= {parameter.maximum:g}, got {value}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def memory_pair(
    memory: Tensor | None, memory_labels: Tensor | None, batch_offset: int | None
) -> None:
    if batch_offset is not None:
        is_int("batch_offset", batch_offset)
        if memory is None:
            raise ValueError("batch_offset must be given together with memory, got memory=None")
    both_or_none("memory", memory, "memory_labels", memory_labels)


def is_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def positive_int(name: str, value: object) -> None:
    is_int(name, value)
    assert isinstance(value, int)
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


def at_most(name: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(f"{name} must be <= {largest}, got {value}")


def number(
    name: str,
    value: object,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """A finite float, larger than ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be <= {at_most:g}, got {value}")


# --- metrics -----------------------------------------------------------------------------------


def scored_pairs(
    feats: Tensor, row_labels: Tensor, other: Tensor | None, other_labels: Tensor | None
) -> None:
    """Features and identities whose pairs are scored."""
    features("feats", feats)
    labels("labels", row_labels, feats.shape[0], feats)
    if (other is None) != (other_labels is None):
        given, missing = (
            ("other", "other_labels") if other_labels is None else ("other_labels", "other")
        )
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if other is not None and other_labels is not None:
        features("other", other, feats)
        labels("other_labels", other_labels, other.shape[0], feats, "other")
        in_range("other_labels", other_labels, -1, None)
    in_range("labels", row_labels, -1, None)


def classified(
    feats: Tensor, weight: Tensor, row_labels: Tensor, bias: object, scale: object
) -> None:
    """Features, class weights and targets whose metrics scale * cosine - bias are compared."""
    features("feats", feats)
    features("weight", weight, feats)
    labels("labels", row_labels, feats.shape[0], feats)
    in_range("labels", row_labels, -1, weight.shape[0])
    number("scale", scale, above=0.0)
    if bias is not None:
        scalar = isinstance(bias, Tensor) and bias.numel() == 1
        per, size = (None, None) if scalar else ("class", weight.shape[0])
        threshold("bias", bias, feats, per=per, size=size)


def ranks(name: str, values: list[int], count: int, kind: str) -> None:
    for value in values:
        positive_int(name, value)
        if value > count:
            raise ValueError(f"{name} must be <= {count}, the number of {kind} pairs, got {value}")


def rates(name: str, values: list[float]) -> None:
    if not values:
        raise ValueError(f"{name} must have at least one rate, got none")
    for value in values:
        number(name, value)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def both_kinds(positives: int, negatives: int) -> None:
    if positives == 0 or negatives == 0:
        raise ValueError(
            "labels must form at least one positive and one negative pair, "
            f"got {positives} positive and {negatives} negative pairs"
        )


def no_nan_scores(count: int) -> None:
    if count:
        raise ValueError(
            "feats and what they are compared with must be finite where the label is not -1, "
            f"got {count} scores that are NaN"
        )


# --- label ranges ------------------------------------------------------------------------------
# On a CUDA tensor reading the labels would stall the stream. The range is checked on the device,
# its verdict copied to pinned memory, and reported by the first call that finds it arrived.

_pending: list[tuple[torch.cuda.Event, Tensor, str]] = []


def in_range(name: str, value: Tensor, low: int, high: int | None) -> None:
    """Integers in [low, high), or [low, inf) without ``high``.

    On CUDA the error of a call is raised by a later call, or at once if the environment has
    ``UNITSFACE_CHECK=1``.
    """
    if value.numel() == 0:
        return
    message = f"{name} must be in [{low}, {'inf' if high is None else high})"
    if low < 0:
        message += " (-1: ignored)"
    if not value.is_cuda:
        smallest, largest = (int(t) for t in torch.aminmax(value))
        if smallest < low or (high is not None and largest >= high):
            raise ValueError(f"{message}, got {smallest if smallest < low else largest}")
        return
    if torch.cuda.is_current_stream_capturing():
        return
    bad = value < low if high is None else (value < low) | (value >= high)
    if os.environ.get("UNITSFACE_CHECK") == "1":
        if bool(bad.any()):
            raise ValueError(f"{message}, got others")
        return
    report_pending()
    verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
    verdict.copy_(bad.any(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, verdict, message))


def report_pending() -> None:
    """Raise for labels of an earlier CUDA call that were found out of range."""
    while _pending and _pending[0][0].query():
        _, verdict, message = _pending.pop(0)
        if bool(verdict):
            _pending.clear()
            raise ValueError(f"{message}, got others in an earlier call")


def call_labels(
    spec: LossSpec,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    identities: int | None = None,
    lowest: int = -1,
) -> None:
    """Ranges of every label and index of a call; ``identities``: how many have a threshold.

    Sharded class losses pass ``lowest=-2``: the target of such a row is in another shard.
    """
    if spec.topology == "pair":
        in_range("labels", row_labels, -1, identities)
        if column_labels is not None:
            in_range("memory_labels", column_labels, -1, identities)
        return
    assert columns is not None
    count = columns.shape[0]
    if column_index is not None:
        in_range("class_index", column_index, 0, count)
        count = column_index.shape[0]
    in_range("labels", row_labels, lowest, count)


# --- adapters ----------------------------------------------------------------------------------

ALL_PAIRS = "every pair takes part; use unitsface_kernels' losses for a margin instead of mining"

# Keywords of pytorch-metric-learning's losses, and what to use instead of another value.
_METRIC_LEARNING_OPTIONS = {
    "distance": "similarities are cosines",
    "reducer": "for losses per row use unitsface_kernels' functions with reduction='none'",
    "embedding_regularizer": "add its value to the loss",
    "embedding_reg_weight": "add the weighted regularizer to the loss",
    "weight_regularizer": "add its value, of W.t(), to the loss",
    "weight_reg_weight": "add the weighted regularizer to the loss",
    "collect_stats": "no statistics are collected",
}


def metric_learning_options(options: dict[str, object], reducer: str) -> None:
    """Known keywords with a value that changes nothing, the defaults' classes included."""
    for name, value in options.items():
        if name not in _METRIC_LEARNING_OPTIONS:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        kind = type(value).__name__
        plain_cosine = kind == "CosineSimilarity" and (
            getattr(value, "p", None),
            getattr(value, "power", None),
        ) == (2, 1)
        if name == "distance" and plain_cosine:
            continue
        if (name == "reducer" and kind == reducer) or (name == "collect_stats" and value is False):
            continue
        if name.endswith("_reg_weight"):
            # Without a regularizer, which is refused, it weighs nothing.
            continue
        unsupported(name, value, _METRIC_LEARNING_OPTIONS[name])


def unsupported(name: str, value: object, instead: str) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None, got {type(value).__name__}: {instead}")


def instance(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name} must be {expected}, got {got}")


def both_or_none(first: str, a: object, second: str, b: object) -> None:
    if (a is None) != (b is None):
        given, missing = (first, second) if b is None else (second, first)
        raise ValueError(f"{missing} must be given together with {given}, got None")


def width(name: str, value: Tensor, size: int) -> None:
    if value.shape[1] != size:
        raise ValueError(f"{name} must have D = {size} columns, got shape {tuple(value.shape)}")


def mask(name: str, value: object, count: int) -> Tensor:
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype bool, got {value.dtype}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(value.shape)}")
    return value


# --- ranks ---------------------------------------------------------------------------------------


def no_rank_failed(mistakes: dict[int, str]) -> None:
    if mistakes:
        raise ValueError("; ".join(f"rank {k}: {text}" for k, text in mistakes.items()))


def same_on_ranks(arguments: list[dict[str, str]]) -> None:
    """Arguments by name, of every rank, that have to be the same."""
    for name in arguments[0]:
        values = [of_rank.get(name, "nothing") for of_rank in arguments]
        if len(set(values)) > 1:
            found = ", ".join(f"{value} on rank {k}" for k, value in enumerate(values))
            raise ValueError(f"{name} must be the same on every rank of the group, got {found}")


def process_group(name: str, value: object) -> None:
    """A group that this process is a member of, or None."""
    distributed = torch.distributed
    if value is None:
        return
    if not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup of which this process is a member, "
            f"or None, got {type(value).__name__}"
        )


# --- sharded classes ---------------------------------------------------------------------------


def shardable(name: str, usable: bool, given: str, known: list[str]) -> None:
    if not usable:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")


def fused_backend(backend: str) -> None:
    if backend == "reference":
        raise ValueError(
            "backend must be 'native' or 'triton' for sharded classes, got 'reference', which "
            "knows no shards"
        )


def same_shard(saved: dict[str, object], own: dict[str, object]) -> None:
    """A saved shard against the one that is to take it."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the saved shard has {name} = {saved.get(name)}, this one has {value}; "
                "unitsface_kernels.partial_fc.load_checkpoint loads checkpoints on another "
                "number of ranks"
            )


def no_pending_step(pending: bool) -> None:
    if pending:
        raise RuntimeError(
            "a fused optimiser takes one backward pass per step: call optimizer.step() and "
            "zero_grad() between them, or train without PartialFC.fuse to accumulate gradients"
        )


# --- row optimisers ----------------------------------------------------------------------------


def owned(group: dict[str, object] | None) -> dict[str, object]:
    if group is None:
        raise ValueError("parameter must be one of the optimizer's parameters, got another")
    return group


def row_options(group: dict[str, object], refused: tuple[str, ...]) -> None:
    """Options of a parameter group that steps on single rows cannot have."""
    for name in refused:
        if group.get(name):
            raise ValueError(
                f"{name} must be {'0' if name == 'dampening' else 'False'} for a parameter that "
                f"is updated by rows, got {group[name]}"
            )


def fused_marker(gradient: Tensor) -> None:
    if not gradient.is_sparse or gradient.sparse_dim() != 2 or gradient._values().numel() > 1:
        raise ValueError(
            "the gradient of a fused parameter must come from one backward pass of its loss "
            f"alone, got one of shape {tuple(gradient.shape)} and layout {gradient.layout}"
            " from elsewhere or added up"
        )
