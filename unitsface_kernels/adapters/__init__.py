"""Fused losses under the names and call signatures of other libraries."""

from . import metric_learning, open_clip, sentence_transformers, sup_contrast

__all__ = ["metric_learning", "open_clip", "sentence_transformers", "sup_contrast"]
