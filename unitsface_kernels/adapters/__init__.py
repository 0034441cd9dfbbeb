"""Fused losses under the names and call signatures of other libraries."""

from . import metric_learning

__all__ = ["metric_learning"]
