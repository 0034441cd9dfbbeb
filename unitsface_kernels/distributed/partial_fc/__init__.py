"""Partial FC: class weights sharded over ranks, of which a step takes a sample."""

from .checkpoint import (
    UNREADABLE,
    is_checkpoint,
    load_checkpoint,
    read_extra,
    read_saved,
    save_checkpoint,
)
from .clipping import clip_grad_norm_
from .module import SHARDABLE, PartialFC
from .plain_pickle import DamagedError, PlainUnpickler

__all__ = [
    "SHARDABLE",
    "UNREADABLE",
    "DamagedError",
    "PartialFC",
    "PlainUnpickler",
    "clip_grad_norm_",
    "dominant_centers",
    "export_class_weights",
    "is_checkpoint",
    "load_checkpoint",
    "read_classes",
    "read_extra",
    "read_saved",
    "save_checkpoint",
]


def __getattr__(name: str) -> object:
    """Training does without the export and what it imports."""
    if name in ("dominant_centers", "export_class_weights", "read_classes"):
        from . import class_weights

        return getattr(class_weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
