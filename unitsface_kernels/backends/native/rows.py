"""The extension's kernels on rows by index: draws of classes, and steps of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense import dense
from . import loader


def _run(name: str, arguments: Any, device: torch.device) -> None:
    native = loader.extension()
    if device.type == "cpu":
        getattr(native.cpu, name)(arguments, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        getattr(native.cuda, name)(arguments, torch.cuda.current_stream().cuda_stream)


def drawn(key: int, size: int, count: int, positives: Tensor) -> Tensor:
    """(count,) int64: the classes at places of a permutation of [0, size): all of ``positives``,
    ascending with ``size`` for none behind them, and the first others."""
    assert positives.dtype == torch.int64
    positives = dense(positives)
    out = torch.empty(count, dtype=torch.int64, device=positives.device)
    arguments = loader.extension().Permuted(
        key=key,
        size=size,
        positives=positives,
        m=positives.numel(),
        n=count,
        out=out,
    )
    _run("permuted", arguments, positives.device)
    return out


def places(key: int, size: int, classes: Tensor) -> Tensor:
    """(N,) int64: the place of each class in that permutation, ``size`` outside [0, size)."""
    assert classes.dtype == torch.int64
    if not classes.numel():
        # An empty tensor's address is null, which the kernel takes as: compute the classes.
        return torch.empty_like(classes)
    classes = dense(classes)
    out = torch.empty_like(classes)
    arguments = loader.extension().Permuted(
        key=key, size=size, classes=classes, n=classes.numel(), out=out
    )
    _run("permuted", arguments, classes.device)
    return out


def update_rows(
    rule: int,
    weight: Tensor,
    gradient: Tensor,
    index: Tensor | None,
    start: int,
    scale: Tensor | None,
    states: tuple[Tensor, ...],
    scalars: dict[str, float],
) -> None:
    """A step on rows of ``weight``; all tensors dense, of float32 but for ``index``."""
    count = gradient.shape[0]
    if not gradient.numel():
        return
    pointers = dict(zip(("first", "second"), states, strict=False))
    arguments = loader.extension().UpdateRows(
        rule=rule,
        weight=weight,
        gradient=gradient,
        index=index,
        start=start,
        n=count,
        d=gradient.numel() // count,
        rows=weight.shape[0],
        gradient_scale=scale,
        **pointers,
        **scalars,
    )
    _run("update_rows", arguments, weight.device)
