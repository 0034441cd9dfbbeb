"""Losses of the user's own: a policy that the configuration names as ``package.module:Class``.

This is the only place where training imports code by a name. The name has to be the user's: one in
a checkpoint alone is refused before (:func:`refuse_stored`), and what only reads a checkpoint, as
evaluation and export do, builds no loss.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import unitsface_kernels as uk
from train.config.keys import names_class
from train.errors import UserError

#: Of ``loss.class`` and of ``loss.pair``: the policies, their modules, and the options of these.
_POLICIES: dict[str, type[Any]] = {"class": uk.policy.Class, "pair": uk.policy.Pair}
MODULES: dict[str, type[nn.Module]] = {"class": uk.ClassLoss, "pair": uk.PairLoss}
_OPTIONS = ("thresholds", "init_threshold", "skip_tolerance")


def refuse_stored(
    stored: Mapping[str, Any], layers: Sequence[tuple[str, Mapping[str, Any]]], where: str
) -> None:
    """An error where a checkpoint names a class that none of the user's layers names."""
    held = stored.get("loss")
    for key in _POLICIES if isinstance(held, dict) else ():
        name = held.get(key)
        named = [v["loss"] for _, v in layers if isinstance(v.get("loss"), dict)]
        if names_class(name) and not any(key in section for section in named):
            raise UserError(
                f"{where}: loss.{key}={name} is code that a checkpoint names; it is imported only "
                f"if you name it, too: loss.{key}={name} as an argument or in a --config file"
            )


def policy_and_options(key: str, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The policy ``name`` with its numbers out of ``options``, and those that its module takes.

    Args:
        key: "class" or "pair".
    """
    cls = _find(key, name)
    numbers = [parameter.name for parameter in cls.formula.numbers]
    given = [v for v in cls.formula.variables if v.given]
    # As the modules: the columns of a class loss are the classes.
    of_calls = ("row",) if key == "class" else ("row", "column")
    unknown = ", ".join(v.name for v in given if v.kind in of_calls)
    if unknown:
        raise UserError(
            f"loss.{key}={name}: training has no values of {unknown}, which the formula needs in "
            "every step"
        )
    known = [*numbers, *(v.name for v in given), *_OPTIONS]
    known += ["init_std"] if key == "class" else []
    for option in options:
        if option not in known:
            raise UserError(f"loss.{key}_options.{option}: {name} takes {', '.join(known)}")
    policy = cls(**{option: value for option, value in options.items() if option in numbers})
    return policy, {o: value for o, value in options.items() if o not in numbers}


def default_numbers(key: str, name: str) -> dict[str, float | str]:
    """Numbers of the policy ``name``, with their defaults."""
    return {number.name: number.default for number in _find(key, name).formula.numbers}


def _find(key: str, name: str) -> type[Any]:
    base = _POLICIES[key]
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: nothing there hides an installed module
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's code raises
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"loss.{key}={name}: cannot import {module}: {kind}{error}") from error
    if not (isinstance(found, type) and issubclass(found, base) and hasattr(found, "formula")):
        raise UserError(
            f"loss.{key}={name}: expected a policy, a class derived from "
            f"unitsface_kernels.policy.{base.__name__}, got "
            + ("nothing of that name" if found is None else f"{found!r:.100}")
        )
    return found
