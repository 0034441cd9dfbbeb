"""Triton policies, one per loss of the registry, generated from their formulas.

A module of ``generated`` is named after its loss and ends with its ``POLICY``. A policy of a ``sum``
loss has ``logit``, of a ``logsumexp`` loss ``negative`` and ``positive``: JIT functions over tiles
that the kernels receive as constants.
"""

from __future__ import annotations

import importlib

from ....losses import REGISTRY
from .policy import LogsumexpPairsPolicy, LogsumexpPolicy, Policy, SumPolicy

#: A ``nearest`` loss needs none, see ``LossSpec.triplet``.
POLICIES: dict[str, Policy] = {
    spec.name: importlib.import_module(f"..generated.{spec.policy or spec.name}", __name__).POLICY
    for spec in REGISTRY.values()
    if spec.triplet is None
}

__all__ = ["POLICIES", "LogsumexpPairsPolicy", "LogsumexpPolicy", "SumPolicy"]
