"""Softmax losses over classes whose margin is that of the row or of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..functional.margins import check_norm_bounds, frequency_margins
from ..losses import magface
from ..losses.class_margin import SPEC as CLASS_MARGIN
from ..losses.class_margin import ClassMargin
from .class_loss import RegisteredClassLoss
from .custom import ClassLoss

_MAGFACE, _CLASS_MARGIN = magface.SPEC.default, CLASS_MARGIN.default


class MagFaceLoss(RegisteredClassLoss):
    """Class weights and MagFace; see :func:`fused_magface_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, l_a, u_a, l_margin, u_margin, lambda_g, margin_type, reduction, backend,
            skip_tolerance, centers: as the function's. The published proof that norms converge
            takes ``lambda_g >= scale * K * u_a**2 * l_a**2 / (u_a**2 - l_a**2)``, K the growth of
            the margin per unit of the norm.
        init_std: standard deviation of the initial weights; None: 0.01.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, bounds or init_std; from a call, as the function.
    """

    loss = "magface"
    scale: float | Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _MAGFACE.scale,
        l_a: float = _MAGFACE.l_a,
        u_a: float = _MAGFACE.u_a,
        l_margin: float | Tensor = _MAGFACE.l_margin,
        u_margin: float | Tensor = _MAGFACE.u_margin,
        lambda_g: float | Tensor = _MAGFACE.lambda_g,
        margin_type: str = _MAGFACE.margin_type,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        check_norm_bounds(l_a, u_a)
        super().__init__(locals())


class ClassMarginLoss(ClassLoss):
    """Class weights and a margin for every class; see :func:`fused_class_margin_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, kind, reduction, backend, skip_tolerance, centers: as the function's.
        margin: of every class, (C,) or one number: of the rarest class, with ``counts``.
        counts: (C,) samples per class, from which :func:`frequency_margins` makes the margins with
            ``smallest`` and ``power``; None: margins do not depend on them.
        learned: whether the margins are a parameter. They fall without a term that keeps them up,
            as ``loss - 0.1 * module.margin.mean()``.
        init_std: standard deviation of the initial weights; None: 0.01.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        margin: (C,) parameter or buffer.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, margins, counts or init_std; from a call, as the
            function.
    """

    loss = "class_margin"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _CLASS_MARGIN.scale,
        margin: float | Tensor = ClassMargin.margin,
        kind: str = _CLASS_MARGIN.kind,
        counts: Tensor | None = None,
        smallest: float | None = None,
        power: float = 0.25,
        learned: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        validate.instance("learned", learned, bool, "a bool")
        if counts is None and smallest is not None:
            raise ValueError(f"counts must be given for smallest={smallest}, got None")
        validate.number("power", power, at_least=0.0)
        if isinstance(margin, Tensor) and margin.requires_grad and not learned:
            raise ValueError(
                f"learned must be True for a margin that needs a gradient, got {learned}"
            )
        if counts is not None:
            validate.number("margin", margin, kind="a float where there are counts")
            # Also while modules are made without memory.
            with torch.device("cpu"):
                margin = frequency_margins(counts, margin, smallest, power)  # type: ignore[arg-type]
            if len(counts) != num_classes:
                raise ValueError(
                    f"counts must have shape ({num_classes},), got {tuple(counts.shape)}"
                )
        super().__init__(
            ClassMargin(scale=scale, kind=kind),
            embedding_size,
            num_classes,
            reduction=reduction,
            backend=backend,
            skip_tolerance=skip_tolerance,
            init_std=init_std,
            centers=centers,
            margin=margin,
        )
        self.learned = learned
        if not learned:
            self.register_buffer("margin", self._parameters.pop("margin").detach())  # type: ignore

    def _keywords(self) -> dict[str, Any]:
        return {**self.values(), **super()._keywords()}
