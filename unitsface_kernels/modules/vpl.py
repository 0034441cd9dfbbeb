"""VPL: class weights mixed with a recent feature of their class."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import validate
from ..backends.reference import normalize_rows
from ..compiling import never_compiled
from ..distributed.collectives import gather_rows
from ..memory import newest_rows
from .class_loss import Comparison
from .composed import ComposedLoss
from .margin_softmax import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss


class VPLLoss(ComposedLoss):
    r"""Variational prototype learning over ArcFace or CosFace.

    The margin softmax compares with

    .. math:: \tilde w_c = (1 - \lambda_c)\, \hat w_c + \lambda_c M_c

    where M_c is the newest unit feature of class c, without gradient. :math:`\lambda_c` is ``mix``
    after ``start_iteration`` training steps for classes seen within the last ``max_age`` steps,
    else 0. Each training step stores its features after the loss; evaluation does not mix.

    Source: Deng et al., "Variational Prototype Learning for Deep Face Recognition", CVPR 2021, and
    its published code (insightface). Of several samples of a class in a batch the last one is
    stored; there any of them.

    While some class is mixed, every step copies the (C, D) class weights and synchronizes with the
    device to find the mixed classes.

    Args:
        embedding_size: D.
        num_classes: C.
        base: "arcface" or "cosface".
        scale: s > 0.
        margin: of the base; None: 0.5 radians for "arcface", 0.4 for "cosface".
        mix: lambda in [0, 1].
        max_age: steps after which a feature counts as old.
        start_iteration: steps without mixing.
        reduction, backend, margin_gradient, skip_tolerance: as the head's function's.
        init_std: standard deviation of the initial class weights; None: 0.01, as published.

    Attributes:
        head: the base's module with its (C, D) class weights.
        features: (C, D) buffer of unit rows, at first in random directions.
        stamps: (C,) int64 buffer, the step at which each was stored; 0: never.
        iteration: () int64 buffer, training steps so far.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or options; from a call, as the head.
    """

    loss = "vpl"
    _heads: ClassVar = {"cosface": CosFaceLoss, "arcface": ArcFaceLoss}
    _shown = ("base", "mix", "max_age", "start_iteration")
    random_rows: tuple[str, ...] = ("features",)
    head: MarginSoftmaxLoss
    features: Tensor
    stamps: Tensor
    iteration: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        base: str = "arcface",
        scale: float | Tensor = 64.0,
        margin: float | None = None,
        mix: float = 0.15,
        max_age: int = 200,
        start_iteration: int = 8000,
        reduction: str = "mean",
        backend: str = "auto",
        margin_gradient: str = "exact",
        init_std: float | None = None,
        skip_tolerance: float = 0.0,
    ) -> None:
        validate.number("mix", mix, at_least=0.0, at_most=1.0)
        validate.number("max_age", max_age, at_least=0)
        validate.number("start_iteration", start_iteration, at_least=0)
        if margin is None:
            margin = 0.5 if base == "arcface" else 0.4
        super().__init__(
            base,
            embedding_size,
            num_classes,
            scale=scale,
            margin=margin,
            reduction=reduction,
            backend=backend,
            margin_gradient=margin_gradient,
            init_std=init_std,
            skip_tolerance=skip_tolerance,
        )
        self.mix = mix
        self.max_age = max_age
        self.start_iteration = start_iteration
        self.register_buffer("features", torch.empty(num_classes, embedding_size))
        self.register_buffer("stamps", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("iteration", torch.tensor(0))
        # The buffer is for state dicts; reading it would synchronize at every step.
        self._iteration = 0
        self._reset_features()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_features()

    def _reset_features(self) -> None:
        nn.init.normal_(self.features)
        with torch.no_grad():
            self.features.copy_(normalize_rows(self.features))
            self.stamps.zero_()
            self.iteration.zero_()
        self._iteration = 0

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._iteration = int(self.iteration)

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self._advance()
        loss = self.head.compare(feats, self._mixed_weight(), labels)
        if self.training:
            self.update(feats, labels)
        return loss

    def _advance(self) -> None:
        self._iteration += 1
        self.iteration.fill_(self._iteration)

    def begin_step(self, feats: Tensor, labels: Tensor) -> None:
        self._advance()

    @torch.no_grad()
    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        self._store(feats.float(), labels)

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        return normalize_rows(normal)

    def comparisons(self) -> list[Comparison]:
        (block,) = self.head.comparisons()
        return [replace(block, columns=self._mixed_weight())]

    @never_compiled
    def _mixed_weight(self) -> Tensor:
        weight = self.head.weight
        if not self.training or self._iteration <= self.start_iteration or self.mix == 0.0:
            return weight
        fresh = (self.stamps > 0) & (self._iteration - self.stamps <= self.max_age)
        rows = fresh.nonzero().squeeze(1)
        if rows.numel() == 0:
            return weight
        unit = normalize_rows(weight[rows])
        mixed = torch.lerp(unit, self.features[rows].to(unit.dtype), self.mix)
        # The loss normalizes its class weights, mixed rows like all others.
        return weight.index_copy(0, rows, mixed)

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor) -> None:
        """Stores the unit features of a batch; in a process group of every rank's batch."""
        self._store(*gather_rows(feats.detach().float(), labels.to(torch.int64)))

    def _store(self, feats: Tensor, labels: Tensor) -> None:
        if labels.numel() == 0 or self.stamps.shape[0] == 0:
            return
        slots, newest = newest_rows(labels, feats, self.stamps.shape[0])
        known = newest >= 0
        unit = normalize_rows(feats)[newest.clamp(min=0)]
        unit = unit.to(self.features.dtype)
        self.features.index_copy_(0, slots, torch.where(known[:, None], unit, self.features[slots]))
        stamps = torch.where(known, self._iteration, self.stamps[slots])
        self.stamps.index_copy_(0, slots, stamps)
