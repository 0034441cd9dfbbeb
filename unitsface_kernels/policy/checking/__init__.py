"""``policy.check``: whether a user's loss is what its formula says, everywhere."""

from __future__ import annotations

from ...functional.custom import check_policy
from ..definition import Policy
from .backends import check_backends
from .formula import check_formula
from .report import Finding, Report

__all__ = ["Finding", "Report", "check"]


def check(
    loss: object, backends: tuple[str, ...] | list[str] | None = None, *, show: bool = True
) -> Report:
    """Checks a user's loss and prints what was found as a table.

    - Derivatives that kernels use, by the cosine, the threshold and every variable, against finite
      differences of the formula, between -1 and 1 and at thresholds up to 1e4; at kinks that of
      either side is right, and ``policy.detach`` is held constant.
    - float32 against float64, for value and derivatives, with the effect that rounding every
      operation once may have as the limit.
    - Whether all of it is finite.
    - Loss and gradients of every backend against float64, for usual features and for extreme ones:
      cosines of 1, -1 and 0, zero, tiny and huge rows, thresholds of 1e4. The limit is what
      rounding the features changes.

    Args:
        loss: a policy such as ``Contrastive(margin=0.3)``, or its ``PairLoss`` or ``ClassLoss``,
            whose numbers are checked.
        backends: of "reference", "native", "eager" (native's tiles without a compiler) and
            "triton", which on a machine without a GPU runs in Triton's interpreter, in a process
            of its own. None: all; those that cannot run here are named as such.
        show: whether to print the table.

    Returns:
        What was found: ``report.ok``, and ``report.findings`` as data.

    Raises:
        TypeError: something else than a policy or its module.
        ValueError: an unknown backend, or a number outside of its bounds.
    """
    policy = getattr(loss, "policy", loss)
    topology = policy.topology if isinstance(policy, Policy) else "pair"
    policy = check_policy(policy, topology)
    findings = check_formula(policy)
    findings += check_backends(policy, backends)
    report = Report(repr(policy), tuple(findings))
    if show:
        print(report)
    return report
