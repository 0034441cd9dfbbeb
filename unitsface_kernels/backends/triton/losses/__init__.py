"""Triton policies, one per loss, generated from the formulas: the only ones of this backend.

A module of ``generated`` is named after its loss and ends with its ``POLICY``. A policy of a
``sum`` loss has ``logit`` or ``term``, of a ``logsumexp`` loss ``negative`` and ``positive``: JIT
functions over tiles that the kernels receive as constants. Those of losses outside the registry
are written at their first use.
"""

from __future__ import annotations

import importlib

from ....losses import REGISTRY, TOWERS, LossSpec
from .custom import custom_policy
from .policy import LogsumexpPairsPolicy, LogsumexpPolicy, Policy, SumPolicy, SumTermsPolicy
from .rows import bound_function, row_function

#: By the name of a loss; a generated one since its first use.
_known: dict[str, Policy] = {}


def policy_of(spec: LossSpec) -> Policy:
    """The policy of a loss whose formula is not eager, see ``LossSpec.triplet``."""
    spec = spec.tiles or spec
    name = spec.policy or spec.name
    found = _known.get(name)
    if found is None:
        if name in REGISTRY or name in TOWERS:
            found = importlib.import_module(f"..generated.{name}", __name__).POLICY
        else:
            found = custom_policy(spec)
        _known[name] = found
    return found


__all__ = [
    "LogsumexpPairsPolicy",
    "LogsumexpPolicy",
    "Policy",
    "SumPolicy",
    "SumTermsPolicy",
    "bound_function",
    "policy_of",
    "row_function",
]
