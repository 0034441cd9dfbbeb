"""Checkpoints; a module of its own for its callers, too."""

from __future__ import annotations

from typing import NoReturn

UNREADABLE = "cannot read checkpoint"


def exists(path: object, found: bool) -> None:
    if not found:
        raise ValueError(f"no such checkpoint: {path}")


def replaceable(path: object, fine: bool) -> None:
    if not fine:
        raise ValueError(f"{path} exists and is no checkpoint: it will not be replaced")


def unreadable(path: object, error: Exception) -> NoReturn:
    reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    raise ValueError(f"{UNREADABLE} {path}: {reason[:400]}") from error


def same_identity(path: object, saved: dict[str, object], own: dict[str, object]) -> None:
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"checkpoint {path} has {name} = {saved.get(name)}, this PartialFC has {value}"
            )


def same_tensors(path: object, saved: dict[str, object], own: dict[str, object]) -> None:
    """Names and sizes of tensors in a checkpoint, and those that are to be filled."""
    for name in sorted(saved.keys() | own.keys()):
        given, wanted = saved.get(name), own.get(name)
        if given != wanted:
            raise ValueError(
                f"checkpoint {path} was made with other options of the loss: it has {name} = "
                f"{given}, this PartialFC has {wanted}"
            )


def same_optimizer(path: object, saved: list[int] | None, own: list[int]) -> None:
    """Parameters per group of the optimizer in a checkpoint, None if it has none."""
    if saved is None:
        raise ValueError(f"checkpoint {path} has no optimizer state")
    if saved != own:
        raise ValueError(
            f"the optimizer in checkpoint {path} has groups of {saved} parameters, this one has "
            f"groups of {own}"
        )


def plain(name: str, value: object, fine: bool) -> None:
    if not fine:
        raise TypeError(
            f"{name} must consist of dicts, lists, tuples, tensors, numbers and strings, got "
            f"{type(value).__name__}"
        )
