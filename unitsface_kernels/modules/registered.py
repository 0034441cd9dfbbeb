"""Base of the modules over one public function: options, texts and calls follow from its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..losses import LossSpec, find

#: Keywords of public functions, beside a loss's parameters, that a module keeps as attributes.
SETTINGS = ("reduction", "backend", "skip_tolerance", "group", "exchange", "centers")


class RegisteredLoss(nn.Module):
    """A module over the function of a loss of the package.

    Every parameter of the loss and every setting of the function is an attribute of the same name,
    read at each call. A number of the loss may be a tensor of one element: an ``nn.Parameter`` is a
    parameter of the module, a tensor without gradient a buffer. A subclass names its ``loss``; its
    constructor is the signature that users see, and passes its arguments on by name
    (``locals()``).
    """

    #: Its name.
    loss: str
    spec: LossSpec
    #: The public function.
    function: Callable[..., Tensor]
    _settings: tuple[str, ...]

    reduction: str
    backend: str
    #: First values of the numbers that are tensors.
    _first_numbers: Mapping[str, Tensor] = MappingProxyType({})

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "loss" in vars(cls):
            cls.spec = find(cls.loss)
            cls.function = staticmethod(getattr(functional, cls.spec.function))
            known = inspect.signature(cls.function).parameters
            cls._settings = tuple(name for name in SETTINGS if name in known)

    def _keep(self, given: dict[str, Any]) -> None:
        """Takes the options from the arguments of a constructor, by name."""
        self._keep_values({name: given[name] for name in self.spec.defaults()})
        for name in self._settings:
            setattr(self, name, given[name])

    def _keep_values(self, values: dict[str, Any]) -> None:
        first: dict[str, Tensor] = {}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                setattr(self, name, value)
                continue
            first[name] = value.detach().clone()
            if not value.requires_grad and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                # The parameter itself, which losses may share.
                own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
                self.register_parameter(name, own)
        self._first_numbers = first

    @torch.no_grad()
    def reset_numbers(self) -> None:
        """Sets the numbers that are tensors to their first values."""
        for name, value in self._first_numbers.items():
            getattr(self, name).copy_(value)

    def values(self) -> dict[str, float | str | Tensor]:
        """Parameters of the loss."""
        return {parameter.name: getattr(self, parameter.name) for parameter in self.spec.parameters}

    def _keywords(self) -> dict[str, Any]:
        """Parameters and settings, as the function takes them."""
        return {**self.values(), **{name: getattr(self, name) for name in self._settings}}

    def _shown(self) -> dict[str, Any]:
        """Options in the module's text, in order."""
        values = {name: v for name, v in self.values().items() if name != "adaptive_margin"}
        return {**values, "reduction": self.reduction, "backend": self.backend}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_text(value)}" for name, value in self._shown().items())


def host_number(value: Any) -> float:
    """A number, or the element of a tensor, which waits for its device."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def _text(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    number = "..." if value.is_meta or value.numel() != 1 else f"{host_number(value):g}"
    return f"{type(value).__name__}({number})"
