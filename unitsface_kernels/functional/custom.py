"""Losses of users' own policies."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..distributed.collectives import Group
from ..losses import LossSpec, custom
from ..policy import Class, Pair, Policy
from .call import Options, Samples, class_loss
from .numbers import named
from .ranks import pair_loss

# By topology: base class of the policies, and what takes them.
_TAKERS: dict[str, tuple[type[Policy], str]] = {
    "pair": (Pair, "PairLoss and fused_pair_loss"),
    "class": (Class, "ClassLoss and fused_class_loss"),
}


def check_policy(policy: object, topology: str) -> Policy:
    """An instance of a policy of this topology."""
    base, takers = _TAKERS[topology]
    if isinstance(policy, type) and issubclass(policy, Policy):
        name = policy.__name__
        raise TypeError(f"policy must be an instance, {name}(), got the class {name}")
    if isinstance(policy, Policy) and not isinstance(policy, base):
        (_, others) = _TAKERS[policy.topology]
        raise TypeError(
            f"policy must be a policy.{base.__name__} for {takers}, got "
            f"{type(policy).__name__}, which {others} take"
        )
    if not isinstance(policy, base):
        raise TypeError(
            f"policy must be an instance of a policy.{base.__name__}, got {type(policy).__name__}"
        )
    return policy


def spec_of(policy: Policy, per_column: bool) -> LossSpec:
    """The loss of a policy, with a threshold for each identity or class if ``per_column``."""
    return named(_name_of, type(policy), per_column)


def _name_of(policy: type[Policy], per_column: bool) -> str:
    spec = custom.spec(policy)
    return (custom.per_column(spec) if per_column and spec.threshold != "none" else spec).name


def _checked(policy: Policy, topology: str, b: float | Tensor | None) -> LossSpec:
    check_policy(policy, topology)
    formula, name = policy.formula, type(policy).__name__
    if (b is None) == formula.threshold:
        has, given = ("a threshold", "none") if formula.threshold else ("no threshold", "one")
        raise TypeError(f"{name} has {has}, got {given} as b")
    return spec_of(policy, isinstance(b, Tensor) and b.numel() != 1)


def fused_pair_loss(
    policy: Pair,
    feats: Tensor,
    labels: Tensor,
    *,
    b: float | Tensor | None = None,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    both: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
    **variables: Tensor,
) -> Tensor:
    """A user's own loss over pairs of samples.

    A row's loss is made of its pairs with all other rows of the batch, or with all rows of a
    memory, as the policy's ``combine`` says: by default their sum.

    Args:
        policy: the formula with its numbers, e.g. ``Contrastive(margin=0.3)``, of which each may be
            a tensor of one element.
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        labels: (N,) integer identities; -1 ignores the row, and the column it is in the batch.
        b: the threshold of a policy that has one: a float (no gradient), a one-element tensor, or
            (K,) one per identity, of which a pair takes that of its column.
        memory, memory_labels, batch_offset: as of :func:`fused_uss_loss`.
        both: the memory is a second tower, whose rows have losses, too, against ``feats``: pairs
            count in both directions, from one set of tiles. Of policies whose only variables are
            scalars, with one threshold at most, and not of "topk"; no group.
        reduction: "mean" over the rows that are not ignored, with "logsumexp" over those that have
            a positive, or a negative if the policy has no positives; "sum", or "none" for (N,).
            With ``both`` over the rows of both towers, or (N + M,).
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance, group, exchange: as of :func:`fused_uss_loss`. With variables that every
            pair reads no tile is left out.
        variables: tensors that the formula reads, by the names of its fields: one element for a
            ``policy.Scalar``, (N,) for a ``PerRow``, (M,) for a ``PerColumn``, (K,) for a
            ``PerIdentity``.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype, or a policy of classes.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    spec = _checked(policy, "pair", b)
    validate.instance("both", both, bool, "a bool")
    if both and group is not None:
        raise ValueError(f"both must be False with a group, got {both}")
    samples = Samples(feats, labels, b, memory, memory_labels, batch_offset, both)
    options = Options(reduction, backend, skip_tolerance, variables)
    return pair_loss(spec, policy.values(), samples, options, group, exchange)


def fused_class_loss(
    policy: Class,
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    b: float | Tensor | None = None,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
    **variables: Tensor,
) -> Tensor:
    """A user's own loss of samples against class weights.

    Args:
        policy: the formula with its numbers, of which each may be a tensor of one element; the
            positive of a row is its own class.
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        b: the threshold of a policy that has one: a float (no gradient), a one-element tensor, or
            (C,) one per class.
        class_index: (K,) distinct integer rows of ``weight`` that take part.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,).
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: as of :func:`fused_margin_softmax_loss`. With variables that every pair
            reads no tile is left out.
        centers: as of :func:`fused_margin_softmax_loss`.
        variables: tensors that the formula reads, by the names of its fields: one element for a
            ``policy.Scalar``, (N,) for a ``PerRow``, (C,) for a ``PerColumn`` or ``PerIdentity``.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype, or a policy of pairs.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    spec = _checked(policy, "class", b)
    return class_loss(
        spec,
        policy.values(),
        feats,
        weight,
        labels,
        b,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        variables,
        centers,
    )
