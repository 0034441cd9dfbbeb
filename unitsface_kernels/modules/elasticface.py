"""ElasticFace, which draws a margin for every row of a training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..distributed.collectives import own_rank
from ..draws import normal
from ..functional.statistics import check_batch, target_cosines
from ..losses.elasticface import SPEC
from .class_loss import RegisteredClassLoss, Total

_DEFAULT = SPEC.default
#: Published for the two kinds.
_MARGINS = {"arc": 0.5, "cos": 0.35}
#: Rows of a rank have other numbers than those of the next.
_ROWS_OF_A_RANK = 2**20


class ElasticFaceLoss(RegisteredClassLoss):
    r"""Class weights and ElasticFace; see :func:`fused_elasticface_loss`.

    Every row of a training batch has a margin from a normal distribution. It is a function of
    seed, number of the draw and place of the row: in :class:`PartialFC` the place among the rows of
    all ranks, else among those of the own rank. In ``eval()`` all margins are the mean.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, kind, reduction, backend, skip_tolerance, centers: as the function's.
        margin: mean of the margins; None: 0.5 radians for "arc", 0.35 for "cos", as published.
        std: their standard deviation, >= 0. Published: 0.05, and for ElasticFace+ 0.0175 ("arc")
            and 0.02 ("cos").
        assignment: "random"; "sorted", ElasticFace+ as its paper describes it: the larger the
            cosine of a row with its class, the smaller its margin; or "published", ElasticFace+ as
            its code has it, which permutes the sorted margins by the order of the cosines, not by
            their ranks.
        margin_seed: of the draws, in [0, 2**31).
        init_std: standard deviation of the initial weights; None: 0.01, as published.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        draws: () int64 buffer, how many batches have had margins: training calls with gradients.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or options; from a call, as the function.
    """

    loss = "elasticface"
    scale: float | Tensor
    margin: float
    std: float
    kind: str
    assignment: str
    margin_seed: int
    draws: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | None = None,
        std: float = 0.05,
        kind: str = _DEFAULT.kind,
        assignment: str = "random",
        margin_seed: int = 0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        validate.choice("kind", kind, tuple(_MARGINS))
        margin = _MARGINS[kind] if margin is None else margin
        validate.number("margin", margin)
        validate.number("std", std, at_least=0.0)
        validate.choice("assignment", assignment, ("random", "sorted", "published"))
        validate.integer("margin_seed", margin_seed)
        validate.number("margin_seed", margin_seed, at_least=0, at_most=2**31 - 1)
        super().__init__(locals())
        self.margin, self.std = margin, std
        self.assignment, self.margin_seed = assignment, margin_seed

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        super()._make_parameters(embedding_size, num_classes)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def reset_thresholds(self) -> None:
        """The number of draws, too."""
        self.draws.zero_()

    def variables(self) -> dict[str, float | Tensor]:
        return {"margin": self.margin}

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(feats, labels, class_index)
        check_batch(feats, self.weight, labels, class_index, self.centers)
        cosines = None
        if self.assignment != "random":
            cosines = target_cosines(feats, self.weight, labels, class_index)
        margin = self._margins(labels, cosines, own_rank() * _ROWS_OF_A_RANK)
        loss = self.compare(feats, self.weight, labels, class_index=class_index, margin=margin)
        self._count()
        return loss

    def step_variables(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        cosines = None
        if self.assignment != "random":
            cosines = total(target_cosines(feats, self.weight, labels))
        return {"margin": self._margins(labels, cosines, 0)}

    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        self._count()

    def _count(self) -> None:
        if torch.is_grad_enabled():
            self.draws.add_(1)

    @torch.no_grad()
    def _margins(self, labels: Tensor, cosines: Tensor | None, first: int) -> Tensor:
        """(N,) margins; ``first``: place of the first row."""
        numbers = normal(self.margin_seed, self.draws, first, len(labels))
        margins = self.margin + self.std * numbers
        if cosines is None:
            return margins
        # Rows that take no part are behind all others in both orders.
        takes_part = labels != -1
        margins = torch.where(takes_part, margins, torch.inf).sort().values
        order = cosines.masked_fill(~takes_part, -torch.inf).argsort(descending=True, stable=True)
        if self.assignment == "sorted":
            return torch.empty_like(margins).scatter_(0, order, margins)
        among = takes_part.cumsum(0) - 1
        return margins[among[order]][among.clamp_min(0)]

    def _shown(self) -> dict[str, object]:
        own = {"margin": self.margin, "std": self.std, "assignment": self.assignment}
        return {**super()._shown(), **own}
