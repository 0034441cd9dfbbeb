"""Base of the modules over one public function: options, texts and calls follow from its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..losses import REGISTRY, LossSpec

#: Keywords of public functions, beside a loss's parameters, that a module keeps as attributes.
SETTINGS = ("reduction", "backend", "skip_tolerance", "group", "exchange")


class RegisteredLoss(nn.Module):
    """A module over the function of a loss of the registry.

    Every parameter of the loss and every setting of the function is an attribute of the same name,
    read at each call. A subclass names its ``loss`` (and has a ``spec`` of its own where that is
    not what its parameters follow from); its constructor is the signature that users
    see, and passes its arguments on by name (``locals()``).
    """

    #: Name in the registry of losses.
    loss: str
    spec: LossSpec
    #: The public function.
    function: Callable[..., Tensor]
    _settings: tuple[str, ...]

    reduction: str
    backend: str

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "loss" in vars(cls):
            if "spec" not in vars(cls):
                cls.spec = REGISTRY[cls.loss]
            cls.function = staticmethod(getattr(functional, cls.spec.function))
            known = inspect.signature(cls.function).parameters
            cls._settings = tuple(name for name in SETTINGS if name in known)

    def _keep(self, given: dict[str, Any]) -> None:
        """Takes the options from the arguments of a constructor, by name."""
        self._keep_values({name: given[name] for name in self.spec.defaults()})
        for name in self._settings:
            setattr(self, name, given[name])

    def _keep_values(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def values(self) -> dict[str, float | str]:
        """Parameters of the loss."""
        return {parameter.name: getattr(self, parameter.name) for parameter in self.spec.parameters}

    def variables(self) -> dict[str, Tensor]:
        """Tensors of the module that the formula reads beside its threshold, by name."""
        return {}

    def _keywords(self) -> dict[str, Any]:
        """Parameters, settings and variables, as the function takes them."""
        settings = {name: getattr(self, name) for name in self._settings}
        return {**self.values(), **settings, **self.variables()}

    def _shown(self) -> dict[str, Any]:
        """Options in the module's text, in order."""
        values = {name: v for name, v in self.values().items() if name != "adaptive_margin"}
        return {**values, "reduction": self.reduction, "backend": self.backend}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
