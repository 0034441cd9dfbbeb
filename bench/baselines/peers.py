"""Losses of other packages on the same shapes, imported when they are first called.

None of them has a margin, a threshold per identity or pairs of one identity, and none normalizes.
Common to them and to our losses is one of two losses over every row's scaled cosines with all
columns, without the N x M matrix. Each peer computes one of them here, from normalized inputs, and
:func:`oracle` is its formula. Their times include normalization, like ours.

Softmax cross-entropy of rows with their targets:

- ``liger-kernel``: fused linear cross-entropy, in chunks of rows through a matmul.
- ``cut-cross-entropy``: the same loss, from recomputed tiles; by default it filters
  gradients below the resolution of their dtype, ``cut-cross-entropy-exact`` does not. 16-bit only.
- ``inf-cl``: contrastive loss from recomputed tiles; casts to float32 and multiplies in TF32.
- ``quack``: chunked linear cross-entropy out of CuTe kernels; Hopper and Blackwell, 16-bit.
- ``torch-linear-cross-entropy``: Torch >= 2.13, in chunks of rows; also on the CPU.

Sigmoid cross-entropy of a batch with itself, the diagonal being the positives:

- ``siglip-kernel``: in chunks of rows through a matmul, with a fused epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 64.0
#: Largest slice of D that inf-cl supports.
HEAD_SIZE = 256


class Shape(Protocol):
    """The attributes of a workload used here; ``columns`` 0: the batch itself."""

    @property
    def loss(self) -> str: ...
    @property
    def columns(self) -> int: ...


@dataclass(frozen=True)
class Peer:
    """A loss of another package.

    Attributes:
        loss: a softmax takes (unit rows, unit columns, targets), a sigmoid (unit rows, bias);
            both return the () mean over rows.
        sigmoid: which of the two.
        devices: where it runs.
    """

    loss: Callable[..., Tensor]
    sigmoid: bool = False
    devices: tuple[str, ...] = ("cuda",)


def _liger(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(SCALE * rows, columns, targets)


def _cut_cross_entropy(rows: Tensor, columns: Tensor, targets: Tensor, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(SCALE * rows, columns, targets, **options)


def _inf_cl(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    size = rows.shape[1]
    # The largest power of two that divides D.
    head = min(size & -size, HEAD_SIZE)
    return cal_flash_loss(rows, columns, targets, scale=SCALE, head_dim=head).mean()


def _quack(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(SCALE * rows, columns, targets)


def _torch(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch.nn.functional.linear_cross_entropy: Torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(SCALE * rows, columns, targets, options=options)


def _siglip(rows: Tensor, bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.tensor(math.log(SCALE), device=rows.device)
    return fused_siglip_loss(rows, rows, log_scale, bias)


PEERS: dict[str, Peer] = {
    "liger-kernel": Peer(_liger),
    "cut-cross-entropy": Peer(_cut_cross_entropy),
    "cut-cross-entropy-exact": Peer(partial(_cut_cross_entropy, filter_eps=None)),
    "inf-cl": Peer(_inf_cl),
    "quack": Peer(_quack),
    "torch-linear-cross-entropy": Peer(_torch, devices=("cpu", "cuda")),
    "siglip-kernel": Peer(_siglip, sigmoid=True),
}


def _next_rows(count: int, device: torch.device) -> Tensor:
    """(N,) targets of a batch compared with itself: any but its own column costs the same."""
    return (torch.arange(count, device=device) + 1) % count


def _pair(loss: Callable[..., Tensor], feats: Tensor, labels: Tensor, b: Tensor) -> Tensor:
    unit = F.normalize(feats, dim=1)
    return loss(unit, unit, _next_rows(feats.shape[0], feats.device))


def _sigmoid(loss: Callable[..., Tensor], feats: Tensor, labels: Tensor, b: Tensor) -> Tensor:
    return loss(F.normalize(feats, dim=1), -b)


def _class(loss: Callable[..., Tensor], feats: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss(F.normalize(feats, dim=1), F.normalize(weight, dim=1), labels)


def _softmax_formula(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * rows @ columns.T, targets)


def _sigmoid_formula(rows: Tensor, bias: Tensor) -> Tensor:
    logits = SCALE * rows @ rows.T + bias
    signs = 1.0 - 2.0 * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return F.softplus(signs * logits).sum() / len(rows)


def _adapter(workload: Shape, sigmoid: bool) -> Callable[..., Tensor] | None:
    """The call of a peer by the keywords of a workload's inputs; None where the work differs."""
    if workload.columns == 0:
        return _sigmoid if sigmoid else _pair
    return _class if workload.loss == "margin_softmax" and not sigmoid else None


def peer_losses(workload: Shape, device: str) -> dict[str, Callable[..., Tensor]]:
    """Every peer on a workload, by the keywords of its inputs; none where the work differs.

    In-batch pairs take ``(feats, labels, b)``, of which a softmax leaves labels and threshold
    unused, and a sigmoid the labels; a softmax over classes takes ``(feats, weight, labels)``. A
    package that is missing raises ImportError in the first call.
    """
    found = {}
    for name, peer in PEERS.items():
        adapter = _adapter(workload, peer.sigmoid)
        if adapter is not None and device in peer.devices:
            found[name] = partial(adapter, peer.loss)
    return found


def oracle(workload: Shape, name: str) -> Callable[..., Tensor]:
    """Eager formula of a peer, by the same keywords, in float64.

    It stores the N x M matrix: for small problems.
    """
    sigmoid = PEERS[name].sigmoid
    adapter = _adapter(workload, sigmoid)
    assert adapter is not None

    def evaluate(**inputs: Tensor) -> Tensor:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        return adapter(_sigmoid_formula if sigmoid else _softmax_formula, **wide)

    return evaluate
