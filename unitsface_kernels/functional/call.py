"""The way of a call from its public function to the backend; the same for every loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import autograd, dispatch, ops, passes, validate
from ..backends import reference
from ..backends.streaming import CallConfig, CallTensors
from ..losses import LossSpec
from .numbers import Values, apart
from .variables import (
    Variables,
    most_identities,
    of_identities,
    packed,
)


class Options(NamedTuple):
    """Arguments that every loss has; see the public functions."""

    reduction: str
    backend: str
    skip_tolerance: float = 0.0
    variables: Variables | None = None


class Samples(NamedTuple):
    """Arguments of a loss over pairs; see the public functions.

    ``both``: the memory is a second tower, see :class:`CallConfig`.
    """

    feats: Tensor
    labels: Tensor
    b: float | Tensor | None
    memory: Tensor | None
    memory_labels: Tensor | None
    batch_offset: int | None
    both: bool = False

    def tensors(self) -> CallTensors:
        """The call's tensors without the threshold."""
        return CallTensors(self.feats, self.labels, self.memory, self.memory_labels)


def class_loss(
    spec: LossSpec,
    values: Values,
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    class_index: Tensor | None,
    reduction: str,
    backend: str,
    skip_tolerance: float = 0.0,
    variables: Variables | None = None,
    centers: int = 1,
) -> Tensor:
    """Loss over classes.

    Args:
        values: some may be tensors.
        weight: (C, D), or of several ``centers`` (C * centers, D) or (C, centers, D).
        variables: tensors or numbers by the names of ``spec.variables``.
        centers: vectors of a class, of whose cosines the largest counts.
    """
    validate.features("feats", feats)
    weight = by_class(weight, centers, feats, spec)
    validate.labels("labels", labels, feats.shape[0], feats)
    if class_index is not None:
        validate.class_index("class_index", class_index, weight)
    if spec.threshold == "per_column":
        validate.threshold("b", b, feats, per="class", size=weight.shape[0])
    options = Options(reduction, backend, skip_tolerance, variables)
    tensors = CallTensors(feats, labels, weight, None, class_index)
    config, tensors = _call(spec, values, tensors, b, options)
    return runner(config, tensors)(config, *tensors)


def by_class(weight: Tensor, centers: int, feats: Tensor, spec: LossSpec | None = None) -> Tensor:
    """Class weights, checked, as (C, D), or as (C, centers, D) of several."""
    validate.centers(centers, spec)
    validate.is_tensor("weight", weight)
    if weight.dim() == 3 and (centers > 1 or weight.shape[1] == 1):
        if weight.shape[1] != centers:
            raise ValueError(f"weight must have shape (C, {centers}, D), got {tuple(weight.shape)}")
        validate.features("weight", weight[:, 0], like=feats)
        return weight if centers > 1 else weight[:, 0]
    validate.features("weight", weight, like=feats)
    if weight.shape[0] % centers:
        raise ValueError(
            f"weight must have C * centers rows, a multiple of {centers}, got {weight.shape[0]}"
        )
    if centers == 1:
        return weight
    return weight.unflatten(0, (weight.shape[0] // centers, centers))


def pair_call(
    spec: LossSpec, values: Values, samples: Samples, options: Options
) -> tuple[CallConfig, CallTensors]:
    """The call of a loss over pairs of one process, checked."""
    identities = check_samples(spec, samples)
    self_offset = samples.batch_offset if samples.memory is not None else 0
    return _call(
        spec, values, samples.tensors(), samples.b, options, self_offset, identities, samples.both
    )


def check_samples(spec: LossSpec, samples: Samples) -> int | None:
    """Number of identities that have a threshold of their own; None: it does not matter."""
    feats, labels, b, memory, memory_labels, batch_offset, both = samples
    validate.features("feats", feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    validate.memory_pair(memory, memory_labels, batch_offset)
    if memory is not None and memory_labels is not None:
        validate.features("memory", memory, like=feats)
        validate.labels("memory_labels", memory_labels, memory.shape[0], feats, counted="memory")
    if both:
        sided = [v.name for v in spec.variables if v.side != "scalar"]
        sided += ["b"] if spec.threshold == "per_column" else []
        if memory is None:
            raise ValueError(f"both must be False without memory, got {both}")
        if spec.reduction == "nearest":
            raise ValueError(f'both must be False where combine is "topk", got {both}')
        if sided:
            raise ValueError(
                "both must be False where rows and columns read numbers of their own "
                f"({', '.join(sided)}), got {both}"
            )
    if spec.threshold != "per_column":
        return None
    validate.threshold("b", b, feats, per="identity")
    return b.shape[0] if isinstance(b, Tensor) else None


def _call(
    spec: LossSpec,
    values: Values,
    tensors: CallTensors,
    b: float | Tensor | None,
    options: Options,
    self_offset: int | None = None,
    identities: int | None = None,
    both: bool = False,
) -> tuple[CallConfig, CallTensors]:
    eager = not torch.compiler.is_compiling()
    spec, values, given = apart(spec, values, options.variables, tensors.rows)
    backend, params = check_options(spec, values, tensors.rows, b, options, eager)
    rows, row_labels, columns, column_labels, column_index, *_ = tensors
    # torch.compile cannot branch on data; there the operator itself guards its memory accesses.
    label_range = None
    if eager:
        identities = most_identities(spec, given, identities)
        label_range = validate.call_labels(
            spec, row_labels, columns, column_labels, column_index, identities
        )
    threshold = threshold_of_columns(spec, b, tensors)
    variables = None
    if spec.variables or given:
        variables = packed(spec, given, tensors)
    recorded = torch.is_grad_enabled()
    config = CallConfig(
        spec,
        params,
        options.reduction,
        backend,
        matmul_dtype(rows),
        self_offset,
        float(options.skip_tolerance),
        need_rows=recorded and rows.requires_grad,
        need_columns=recorded and columns is not None and columns.requires_grad,
        need_threshold=recorded and threshold is not None and threshold.requires_grad,
        need_variables=recorded and variables is not None and variables.requires_grad,
        both=both,
        label_range=label_range,
    )
    return config, CallTensors(*tensors[:5], threshold, variables)


def check_options(
    spec: LossSpec,
    values: Values,
    feats: Tensor,
    b: float | Tensor | None,
    options: Options,
    eager: bool = False,
) -> tuple[str, tuple[float, ...]]:
    """The backend that runs a call, and the parameters as kernels receive them.

    ``eager``: nothing is being compiled, which would trace the dictionary of what has passed.
    """
    if not eager:
        _check_numbers(spec, values, options)
    elif _passed.get(key := _key_of_numbers(spec, values, options)) is not spec:
        _check_numbers(spec, values, options)
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed[key] = spec
    if spec.threshold == "scalar":
        validate.threshold("b", b, feats)
    resolve = dispatch.resolve_eagerly if eager else dispatch.resolve
    backend = resolve(options.backend, feats.device, feats.dtype)
    params = spec.pack(values)
    if not spec.normalize and backend != "reference":
        scaled = (feats.is_cuda or backend == "triton") and matmul_dtype(feats) == torch.float16
        _refuse_unbounded(spec, params, options.skip_tolerance, scaled)
    return backend, params


#: The loss by the numbers and words that it passed its checks with: they are the same every step.
_passed: dict[tuple[object, ...], LossSpec] = {}
_MOST_PASSED = 1024


def _key_of_numbers(spec: LossSpec, values: Values, options: Options) -> tuple[object, ...]:
    """What :func:`_check_numbers` reads; empty for what has no hash, which never passes."""
    read = (options.reduction, options.skip_tolerance, *values.values())
    # True is no float, though it equals 1.
    key = (id(spec), *values, *read, *map(type, read))
    try:
        hash(key)
    except TypeError:
        return ()
    return key


def _check_numbers(spec: LossSpec, values: Values, options: Options) -> None:
    validate.parameters(spec, values)
    validate.choice("reduction", options.reduction, validate.REDUCTIONS)
    validate.number("skip_tolerance", options.skip_tolerance, at_least=0.0)


def _refuse_unbounded(
    spec: LossSpec, params: tuple[float, ...], skip_tolerance: float, scaled: bool
) -> None:
    """What relies on a bound of d loss / d inner product, where there is none; ``scaled``: tiles of
    gradients are float16."""
    needs = None
    # Where every pair reads a variable nothing is left out.
    if skip_tolerance > 0.0 and not any(variable.streamed for variable in spec.variables):
        needs = "skip_tolerance"
    elif scaled:
        needs = "float16, in which gradients are scaled,"
    if needs is not None and spec.slope_bound(params) == math.inf:
        raise ValueError(
            f"{needs} needs a bound of the derivative of {spec.name} by the inner product, which "
            "has none without normalization"
        )


def runner(config: CallConfig, tensors: CallTensors) -> Callable[..., Tensor]:
    """The function of (config, \\*tensors) that computes the loss of a call."""
    if config.backend == "reference":
        return reference.similarity_loss
    if torch.compiler.is_compiling():
        return ops.loss
    refuse_transforms(*passes.differentiable(tensors))
    if not autograd.applies(tensors):
        return ops.loss
    return autograd.FusedLoss.apply if config.need_any else autograd.loss_alone


def matmul_dtype(feats: Tensor) -> torch.dtype:
    """Dtype of the operands of matmuls."""
    device_type = feats.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return feats.dtype


def threshold_of_columns(
    spec: LossSpec, b: float | Tensor | None, tensors: CallTensors
) -> Tensor | None:
    """The threshold as a call has it, one number or one per column.

    Args:
        spec, b: of the loss.
        tensors: the others of the call; without columns, ``column_labels`` may be those of all
            ranks.
    """
    if b is None:
        return None
    rows, row_labels, columns, column_labels, column_index, *_ = tensors
    if spec.threshold == "scalar":
        if isinstance(b, Tensor):
            # A threshold of any rank must not change the rank of what it is broadcast against.
            return b.reshape(()) if b.dim() else b
        return torch.full((), float(b), dtype=torch.float32, device=rows.device)
    identity = row_labels if column_labels is None else column_labels
    if not isinstance(b, Tensor):
        count = (identity if columns is None else columns).shape[0]
        if column_index is not None:
            count = column_index.shape[0]
        return torch.full((count,), float(b), dtype=torch.float32, device=rows.device)
    if spec.topology == "class":
        # Indexing, whose backward pass is deterministic on every device.
        return b if column_index is None else b[column_index.to(torch.int64)]
    return of_identities(b, identity)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """The operator would drop torch.func and forward-mode tangents silently."""
    # Outside of every dual level there are no tangents to look for.
    dual = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused losses run neither under torch.func transforms (grad, vmap, jvp, ...) nor "
            'with forward-mode differentiation; use backend="reference" for those'
        )
