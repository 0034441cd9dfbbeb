"""Modules of users' own policies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..distributed.collectives import Group
from ..functional.custom import check_policy, spec_of
from ..losses import LossSpec
from ..policy import Class, Pair, Policy
from ..policy.variable import Variable
from .class_loss import RegisteredClassLoss
from .pair import RegisteredPairLoss
from .registered import SETTINGS, RegisteredLoss


class _PolicyLoss(RegisteredLoss):
    """A module of a policy, which keeps the numbers of the formula; the module keeps tensors.

    A variable of which there is one, or one per identity, is a parameter under the name of its
    field; the others are arguments of every call.
    """

    policy: Policy
    thresholds: str
    init_threshold: float
    _topology: ClassVar[str]
    #: Word for one threshold each, and the argument with their number.
    _each: ClassVar[str]
    _each_size: ClassVar[str]
    #: The identities of which the module holds variables.
    classes: slice = slice(None)

    def _keep(self, given: dict[str, Any]) -> None:
        self.policy = check_policy(given["policy"], self._topology)
        validate.choice("thresholds", given["thresholds"], ("one", f"per_{self._each}"))
        validate.number("init_threshold", given["init_threshold"])
        if given["thresholds"] != "one" and not self.policy.formula.threshold:
            name = type(self.policy).__name__
            raise ValueError(f"{name} has no threshold, got thresholds={given['thresholds']!r}")
        for name in ("thresholds", "init_threshold", *self._settings):
            setattr(self, name, given[name])
        self._initial = self._initial_values(given["initial"])

    def _initial_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """First values of the variables that the module keeps: given, or the field's default."""
        kept = [variable.name for variable in self._kept()]
        found = {}
        for name in given:
            if name not in kept:
                takes = ", ".join(kept) or "none"
                raise TypeError(
                    f"{type(self).__name__}: initial values are those of variables that it keeps "
                    f"({takes}), got {name}"
                )
        for name in kept:
            value = given.get(name, getattr(type(self.policy), name, None))
            if value is None:
                raise TypeError(
                    f"{type(self).__name__}: the variable {name} of {type(self.policy).__name__} "
                    f"needs an initial value ({name}=...), got none"
                )
            if not isinstance(value, Tensor):
                validate.number(name, value, kind="a float or a torch.Tensor")
            found[name] = value
        return found

    def _kept(self) -> list[Variable]:
        """Variables that are the module's: of its columns, the class weights, too."""
        of_calls = ("row", "column") if self._topology == "pair" else ("row",)
        return [v for v in self.policy.formula.variables if v.given and v.kind not in of_calls]

    def _make_variables(self, size: int | None) -> None:
        """Parameters of the variables that the module keeps, ``size`` of those per identity, and
        numbers of the policy that are tensors.
        """
        numbers = {n: v for n, v in self.policy.values().items() if isinstance(v, Tensor)}
        for name in [*numbers, *(variable.name for variable in self._kept())]:
            if hasattr(self, name):
                raise ValueError(
                    f"{type(self.policy).__name__}: a variable cannot have the name of an "
                    f"attribute of its module, got {name}"
                )
        self._keep_values(numbers)
        for variable in self._kept():
            if variable.kind != "scalar" and size is None:
                raise ValueError(
                    f"{self._each_size} must be given for the variable {variable.name}, got None"
                )
            shape = [] if variable.kind == "scalar" else [size or 0]
            self.register_parameter(variable.name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def _reset_variables(self) -> None:
        self.reset_numbers()
        for name, value in self._initial.items():
            parameter = getattr(self, name)
            if isinstance(value, Tensor):
                part = value[self.classes] if value.dim() else value
                if part.dim() and part.shape != parameter.shape:
                    raise ValueError(
                        f"{name} must have shape () or {tuple(parameter.shape)}, got "
                        f"{tuple(part.shape)}"
                    )
                parameter.copy_(part)
            else:
                parameter.fill_(value)

    @property
    def spec(self) -> LossSpec:  # type: ignore[override]
        return spec_of(self.policy, per_column=self.thresholds != "one")

    def values(self) -> dict[str, float | str | Tensor]:
        own = {name: getattr(self, name) for name in self._first_numbers}
        return {**self.policy.values(), **own}

    @property
    def _policy(self) -> Any:
        """The policy, with the numbers that the module keeps as they are now."""
        return type(self.policy)(**self.values()) if self._first_numbers else self.policy

    def variables(self) -> dict[str, float | Tensor]:
        """The parameters that the formula reads beside its threshold, by name."""
        return {name: getattr(self, name) for name in self._initial}

    def _keywords(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self._settings}
        return {**settings, **self.variables()}

    def _shown(self) -> dict[str, Any]:
        thresholds = {} if self.thresholds == "one" else {"thresholds": self.thresholds}
        return {**thresholds, "reduction": self.reduction, "backend": self.backend}

    def extra_repr(self) -> str:
        return f"{self.policy!r}, {super().extra_repr()}"


class PairLoss(RegisteredPairLoss, _PolicyLoss):
    """A user's own loss over pairs of samples; see :func:`fused_pair_loss`.

    ::

        class Contrastive(policy.Pair):
            margin: policy.Number = 0.4
            def positive(self, c): return 1 - c
            def negative(self, c): return policy.maximum(c - self.margin, 0)

        loss = PairLoss(Contrastive(margin=0.3))(feats, labels)

    Args:
        policy: the formula with its numbers. They remain attributes of the policy,
            ``module.policy.margin``, and are read at every call.
        thresholds: of a policy with a ``policy.Threshold``: "one", or "per_identity".
        num_identities: K, for what there is one per identity of.
        init_threshold: first value of the thresholds, in the units of the formula.
        reduction, backend, skip_tolerance, group, exchange: as the function's.
        initial: first values of variables, by name: of a ``policy.Scalar`` a number, of a
            ``PerIdentity`` a number or (K,). A default in the policy need not be given.

    Attributes:
        policy: the formula with its numbers.
        threshold: () or (K,) parameter, if the policy has a threshold.

    Every ``policy.Scalar`` and ``PerIdentity`` of the policy is a parameter under its own name;
    ``requires_grad_(False)`` keeps one constant. A number of the policy that is an ``nn.Parameter``
    is one of the module, too.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,), the int
        batch_offset, and by name the (N,) of a ``policy.PerRow`` and the (M,) of a ``PerColumn``
        -> () float32.

    Raises:
        TypeError, ValueError: a policy of classes, a wrong number or word; from a call, as the
            function.
    """

    _topology, _each, _each_size = "pair", "identity", "num_identities"
    _settings = tuple(name for name in SETTINGS if name != "centers")

    def __init__(
        self,
        policy: Pair,
        *,
        thresholds: str = "one",
        num_identities: int | None = None,
        init_threshold: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        group: Group = None,
        exchange: str = "auto",
        **initial: float | Tensor,
    ) -> None:
        super().__init__(locals())
        self.num_identities = num_identities
        if num_identities is not None:
            validate.positive_int("num_identities", num_identities)
        elif thresholds != "one":
            raise ValueError(
                f"num_identities must be given for thresholds={thresholds!r}, got None"
            )
        if self.spec.threshold != "none":
            shape = [] if thresholds == "one" else [num_identities or 0]
            self.threshold = nn.Parameter(torch.empty(shape))
        self._make_variables(num_identities)
        self.reset_parameters()

    @property
    def function(self) -> Any:  # type: ignore[override]
        return partial(functional.fused_pair_loss, self._policy)

    def reset_parameters(self) -> None:
        if self.spec.threshold != "none":
            nn.init.constant_(self.threshold, self.init_threshold)
        self._reset_variables()

    def forward(  # type: ignore[override]
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
        batch_offset: int | None = None,
        **variables: Tensor,
    ) -> Tensor:
        return self._compare(feats, labels, memory, memory_labels, batch_offset, **variables)

    def _shown(self) -> dict[str, Any]:
        sizes = {} if self.num_identities is None else {"num_identities": self.num_identities}
        return {**sizes, **super()._shown()}


class ClassLoss(RegisteredClassLoss, _PolicyLoss):
    """A user's own loss against class weights; see :func:`fused_class_loss`.

    ``PartialFC(policy, embedding_size, num_classes)`` is the same with the classes in shards.

    Args:
        policy: the formula with its numbers. They remain attributes of the policy,
            ``module.policy.margin``, and are read at every call.
        embedding_size: D.
        num_classes: C.
        thresholds: of a policy with a ``policy.Threshold``: "one", or "per_class".
        init_threshold: first value of the thresholds, in the units of the formula.
        reduction, backend, skip_tolerance, centers: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01.
        initial: first values of variables, by name: of a ``policy.Scalar`` a number, of a
            ``PerColumn`` or ``PerIdentity`` a number or (C,). A default in the policy need not be
            given.

    Attributes:
        policy: the formula with its numbers.
        weight: (C, D) parameter, with several centers (C, centers, D).
        threshold: () or (C,) parameter, if the policy has a threshold.

    Every variable of the policy but a ``policy.PerRow`` is a parameter under its own name;
    ``requires_grad_(False)`` keeps one constant. A number of the policy that is an ``nn.Parameter``
    is one of the module, too.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,), and by
        name the (N,) of a ``policy.PerRow`` -> () float32.

    Raises:
        TypeError, ValueError: a policy of pairs, wrong sizes, a wrong number or word; from a call,
            as the function.
    """

    _topology, _each, _each_size = "class", "class", "num_classes"
    _settings = ("reduction", "backend", "skip_tolerance", "centers")

    def __init__(
        self,
        policy: Class,
        embedding_size: int,
        num_classes: int,
        *,
        thresholds: str = "one",
        init_threshold: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
        **initial: float | Tensor,
    ) -> None:
        super().__init__(locals())

    @property
    def function(self) -> Any:  # type: ignore[override]
        return partial(functional.fused_class_loss, self._policy)

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        super()._make_parameters(embedding_size, num_classes)
        self._make_variables(num_classes)

    def reset_thresholds(self) -> None:
        if self.spec.threshold != "none":
            nn.init.constant_(getattr(self, self._threshold_name), self.init_threshold)
        self._reset_variables()

    def forward(  # type: ignore[override]
        self,
        feats: Tensor,
        labels: Tensor,
        class_index: Tensor | None = None,
        **variables: Tensor,
    ) -> Tensor:
        return self.compare(feats, self.weight, labels, class_index=class_index, **variables)
