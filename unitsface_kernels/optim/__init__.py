"""Torch's SGD and AdamW with steps on single rows of a parameter."""

from .optimizers import RowOptimizer, SampledAdamW, SampledSGD
from .update import RowUpdate

__all__ = ["RowOptimizer", "RowUpdate", "SampledAdamW", "SampledSGD"]
