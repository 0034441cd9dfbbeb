"""Checks of arguments that several public functions and modules share.

A check with one caller stands in its caller.
"""

from .arguments import (
    REDUCTIONS,
    both_or_none,
    centers,
    choice,
    class_index,
    features,
    instance,
    is_tensor,
    labels,
    memory_pair,
    number_tensor,
    parameters,
    process_group,
    same_device,
    threshold,
    width,
)
from .label_ranges import (
    call_labels,
    in_range,
    report_later,
)
from .metrics import (
    both_kinds,
    no_nan_scores,
    scored_pairs,
)
from .numbers import (
    at_most,
    integer,
    number,
    positive_int,
)
from .operands import operands, packed

__all__ = [
    "REDUCTIONS",
    "at_most",
    "both_kinds",
    "both_or_none",
    "call_labels",
    "centers",
    "choice",
    "class_index",
    "features",
    "in_range",
    "instance",
    "integer",
    "is_tensor",
    "labels",
    "memory_pair",
    "no_nan_scores",
    "number",
    "number_tensor",
    "operands",
    "packed",
    "parameters",
    "positive_int",
    "process_group",
    "report_later",
    "same_device",
    "scored_pairs",
    "threshold",
    "width",
]
