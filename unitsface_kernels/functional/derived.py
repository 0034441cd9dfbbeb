"""Public functions of losses that have none of their own: signature and call from the spec."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor

from ..losses import LossSpec
from .call import Options, Samples, class_loss
from .ranks import pair_loss

_SETTINGS: dict[str, Any] = {"reduction": "mean", "backend": "auto", "skip_tolerance": 0.0}
_CLASSES: dict[str, Any] = {"class_index": None, **_SETTINGS, "centers": 1}
_PAIRS: dict[str, Any] = {
    **{"memory": None, "memory_labels": None, "batch_offset": None},
    **_SETTINGS,
    **{"group": None, "exchange": "auto"},
}


def public_function(spec: LossSpec) -> Callable[..., Tensor]:
    """The function of a loss: tensors by position, all else by keyword, variables of the formula
    among it.

    Shapes and errors are those of the losses of the same topology: ``fused_uce_loss`` for classes,
    ``fused_uss_loss`` for pairs; of variables those of ``fused_class_loss`` and
    ``fused_pair_loss``.
    """
    classes = spec.topology == "class"
    tensors = ["feats", *(["weight"] if classes else []), "labels"]
    if spec.threshold != "none":
        tensors.append("b")
    options = {**spec.defaults(), **(_CLASSES if classes else _PAIRS)}
    variables = [variable.name for variable in spec.variables if variable.given]
    signature = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in tensors]
        + [Parameter(name, Parameter.KEYWORD_ONLY) for name in variables]
        + [Parameter(n, Parameter.KEYWORD_ONLY, default=value) for n, value in options.items()]
    )

    def function(*arguments: Any, **keywords: Any) -> Tensor:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        given = {"b": None, "both": False, **bound.arguments}
        values = {name: given[name] for name in spec.defaults()}
        settings = {name: given[name] for name in _SETTINGS}
        settings["variables"] = {name: given[name] for name in variables}
        if classes:
            columns = [given[name] for name in ("feats", "weight", "labels", "b", "class_index")]
            options = {**settings, "centers": given["centers"]}
            return class_loss(spec, values, *columns, **options)
        samples = Samples(*(given[name] for name in Samples._fields))
        return pair_loss(
            spec, values, samples, Options(**settings), given["group"], given["exchange"]
        )

    function.__name__ = function.__qualname__ = spec.function
    function.__doc__ = f"The loss ``{spec.name}`` of the registry. Source: {spec.source}."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function
