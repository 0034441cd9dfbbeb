"""Evaluation over all pairs of features, or all features and classes, in bounded memory.

Every figure is exact for the float32 cosines that the backend computes; docs/metrics.md has the
definitions. Backends: "native" (CPU and CUDA) and "reference" (Torch operations, any device).
"""

from .classification import ClassificationAccuracy, classification_accuracy
from .histogram import ROC, PairHistogram, pair_histogram, roc
from .identities import IdentityThresholds, identity_thresholds
from .nearest import Nearest, nearest
from .order_statistics import kth_largest_score
from .thresholds import BestThreshold, ThresholdGap, best_threshold, threshold_gap
from .verification import TarAtFar, tar_at_far

__all__ = [
    "ROC",
    "BestThreshold",
    "ClassificationAccuracy",
    "IdentityThresholds",
    "Nearest",
    "PairHistogram",
    "TarAtFar",
    "ThresholdGap",
    "best_threshold",
    "classification_accuracy",
    "identity_thresholds",
    "kth_largest_score",
    "nearest",
    "pair_histogram",
    "roc",
    "tar_at_far",
    "threshold_gap",
]
