"""Fused kernels of other packages on the same shapes, imported when they are first called.

None of them has a margin, a threshold or pairs of one identity, and none normalizes. Common to them
and to our losses is a softmax cross-entropy over every row's scaled cosines with all columns,
without the N x M matrix: each of them computes that here, from normalized inputs, and
:func:`oracle` is the formula. Their times include normalization, like ours.

- ``liger-kernel``: fused linear cross-entropy, in chunks of rows through a matmul.
- ``cut-cross-entropy``: the same loss, from recomputed tiles; by default it filters
  gradients below the resolution of their dtype, ``cut-cross-entropy-exact`` does not. 16-bit only.
- ``inf-cl``: contrastive loss from recomputed tiles; casts to float32 and multiplies in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 64.0
#: Largest slice of D that inf-cl supports.
HEAD_SIZE = 256

#: softmax cross-entropy of (unit rows, unit columns, targets): () mean.
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(Protocol):
    """The attributes of a workload used here; ``columns`` 0: the batch itself."""

    @property
    def loss(self) -> str: ...
    @property
    def columns(self) -> int: ...


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


PEERS: dict[str, Peer] = {
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
    "cut-cross-entropy-exact": partial(_cut_cross_entropy, filter_eps=None),
    "inf-cl": _inf_cl,
}


def _next_rows(count: int, device: torch.device) -> Tensor:
    """(N,) targets of a batch compared with itself: any but its own column costs the same."""
    return (torch.arange(count, device=device) + 1) % count


def _pair(peer: Peer, feats: Tensor, labels: Tensor, b: Tensor) -> Tensor:
    unit = F.normalize(feats, dim=1)
    return peer(unit, unit, _next_rows(feats.shape[0], feats.device))


def _class(peer: Peer, feats: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return peer(F.normalize(feats, dim=1), F.normalize(weight, dim=1), labels)


def cuda_implementations(workload: Shape) -> dict[str, Callable[..., Tensor]]:
    """Every peer on a workload, by the keywords of its inputs; none where the work differs.

    In-batch pairs take ``(feats, labels, b)``, of which labels and threshold are left unused; a
    softmax over classes takes ``(feats, weight, labels)``. A package that is missing raises
    ImportError in the first call.
    """
    if workload.columns == 0:
        adapter: Callable[..., Tensor] = _pair
    elif workload.loss == "margin_softmax":
        adapter = _class
    else:
        return {}
    return {name: partial(adapter, peer) for name, peer in PEERS.items()}


def _cross_entropy(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * rows.double() @ columns.double().T, targets)


def oracle(workload: Shape) -> Callable[..., Tensor] | None:
    """Eager float64 formula of the implementations of a workload; None where there is none.

    Takes the same keywords. It stores the N x M matrix: for small problems.
    """
    if not cuda_implementations(workload):
        return None
    adapter = _pair if workload.columns == 0 else _class

    def evaluate(**inputs: Tensor) -> Tensor:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        return adapter(_cross_entropy, **wide)

    return evaluate
