"""Partial FC: class weights sharded over ranks, of which a step takes a sample."""

from .clipping import clip_grad_norm_
from .module import PartialFC

__all__ = ["PartialFC", "clip_grad_norm_"]
