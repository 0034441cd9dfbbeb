"""NPT and its class weights."""

from __future__ import annotations

from torch import Tensor

from ..losses.npt import SPEC
from .class_loss import RegisteredClassLoss

_DEFAULT = SPEC.default


class NPTLoss(RegisteredClassLoss):
    """Class weights and the nearest proxies triplet; see :func:`fused_npt_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        margin, k, hinges, reduction, backend, centers: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01. The code published for the
            loss draws them uniformly by Xavier's rule, of deviation (2 / (C + D)) ** 0.5.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "npt"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: float | Tensor = _DEFAULT.margin,
        k: int = _DEFAULT.k,
        reduction: str = "mean",
        backend: str = "auto",
        hinges: str = _DEFAULT.hinges,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        super().__init__(locals())
