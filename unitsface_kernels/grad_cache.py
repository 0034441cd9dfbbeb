"""Batches that a backbone cannot hold: features first, gradients of the backbone in a second pass.

The loss of a contrastive batch needs all of its features at once, but not the activations behind
them: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021
(arXiv 2101.06983), section 3. With a loss that stores no N x N matrix the memory is that of a
chunk's activations and of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import validate

Encoder = Callable[[Any], Tensor]


def cached_backward(
    encoders: Sequence[Encoder],
    chunks: Sequence[Sequence[Any]],
    loss: Callable[..., Tensor],
    *,
    factor: float = 1.0,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """The loss of all features, and ``backward`` of it through the encoders, chunk by chunk.

    Every chunk passes its encoder twice, with the same random numbers (dropout). What an encoder
    updates in a forward pass, as statistics of batch normalization, it updates twice, and its
    output must not depend on that.

    Args:
        encoders: one for each tower, which may be the same; of a chunk it returns the (n, D)
            features.
        chunks: of each tower, what its encoder takes.
        loss: of the (N, D) features of every tower, e.g. a :class:`CLIPLoss`; its own parameters
            get their gradients, too.
        factor: of the loss in the backward pass, as that of a gradient scaler.
        no_sync: of the data parallelism of one model that has all encoders, e.g.
            ``model.no_sync``: all chunks but the last are passed back in this context, so that
            gradients are averaged once. Of several models only that of the last chunk would be.

    Returns:
        () loss, without graph.

    Raises:
        ValueError: another number of encoders than of towers, or a tower without chunks.
    """
    if len(encoders) != len(chunks):
        raise ValueError(f"encoders must be {len(chunks)}, one for each tower, got {len(encoders)}")
    for tower in chunks:
        if not tower:
            raise ValueError(f"chunks must have one or more of each tower, got {len(tower)}")
    validate.number("factor", factor)
    states, features = [], []
    for encoder, tower in zip(encoders, chunks, strict=True):
        parts = []
        for chunk in tower:
            states.append(_RandomState())
            with torch.no_grad():
                parts.append(encoder(chunk))
        features.append(parts)
    whole = [torch.cat(parts).requires_grad_() for parts in features]
    value = loss(*whole)
    (value * factor).backward()
    gradients = [
        part
        for tower, parts in zip(whole, features, strict=True)
        for part in _gradient(tower).split([len(part) for part in parts])
    ]
    del whole, features
    work = [(encoder, c) for encoder, tower in zip(encoders, chunks, strict=True) for c in tower]
    for place, ((encoder, chunk), state) in enumerate(zip(work, states, strict=True)):
        last = place == len(work) - 1
        context = nullcontext() if last or no_sync is None else no_sync()
        with context, state:
            again = encoder(chunk)
            if again.requires_grad:
                again.backward(gradients[place].to(again.dtype))
    return value.detach()


def _gradient(features: Tensor) -> Tensor:
    return torch.zeros_like(features) if features.grad is None else features.grad


class _RandomState:
    """The random numbers of the moment when it is made, to be had again."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = (
            list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        )
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=self._devices)
        self._fork.__enter__()
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
