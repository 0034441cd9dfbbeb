"""VPL: class weights mixed with a recent feature of their class."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import validate
from ..backends.reference import normalize_rows
from ..backends.streaming import Changes, Mixing
from ..compiling import never_compiled
from ..distributed.collectives import gather_rows
from ..memory import newest_rows
from .class_loss import Comparison, FeatureStore, check_stored
from .composed import ComposedLoss
from .margin_softmax import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss


class VPLLoss(ComposedLoss, FeatureStore):
    r"""Variational prototype learning over ArcFace or CosFace.

    The margin softmax compares with

    .. math:: \tilde w_c = (1 - \lambda_c)\, \hat w_c + \lambda_c M_c

    where M_c is the newest unit feature of class c, without gradient. :math:`\lambda_c` is ``mix``
    after ``start_iteration`` training steps for classes seen within the last ``max_age`` steps,
    else 0. Each training step stores its features after the loss; evaluation does not mix.

    The published option ``momentum`` stores the features of a second backbone, whose weights are
    a running average of the first one's (decay 0.999 per step there): ``momentum_feats``.

    Source: Deng et al., "Variational Prototype Learning for Deep Face Recognition", CVPR 2021, and
    its published code, recognition/vpl/vpl.py of deepinsight/insightface. Of several samples of a
    class in a batch the last one is stored; there any of them. Classes that were never seen are not
    mixed; there they are, with a random direction, within the first ``max_age`` steps.

    While some class is mixed, every step copies the (C, D) class weights and synchronizes with the
    device to find the mixed classes. In :class:`PartialFC` nothing is copied: class weights are
    mixed tile by tile.

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
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally momentum_feats (N, D)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or options; from a call, as the head, and
            momentum_feats that are not as feats.
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
        # A backward pass may look back to it, after the features have changed.
        self._moment = Changes()
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

    def forward(
        self, feats: Tensor, labels: Tensor, momentum_feats: Tensor | None = None
    ) -> Tensor:
        check_stored(self, feats, momentum_feats)
        loss = self.head.compare(feats, self._mixed_weight(), labels)
        if self.training:
            self._count()
            self.update(feats if momentum_feats is None else momentum_feats, labels)
        return loss

    def _count(self) -> None:
        self._iteration += 1
        self.iteration.fill_(self._iteration)

    @torch.no_grad()
    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        self._count()
        self._store(feats.float(), labels)

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        return normalize_rows(normal)

    def comparisons(self) -> list[Comparison]:
        (block,) = self.head.comparisons()
        return [replace(block, mixing=self._mixing())]

    @never_compiled
    def _mixed_weight(self) -> Tensor:
        (block,) = self.comparisons()
        return block.mixed_columns()

    def _mixing(self) -> Mixing | None:
        # The step in progress, which is counted after its loss: a call that raises is none.
        step = self._iteration + 1
        if not self.training or step <= self.start_iteration or self.mix == 0.0:
            return None
        fresh = (self.stamps > 0) & (step - self.stamps <= self.max_age)
        return Mixing(self.features, fresh.to(self.features.dtype) * self.mix, self._moment)

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor) -> None:
        """Stores the unit features of a batch; in a process group of every rank's batch."""
        wide = torch.promote_types(feats.dtype, torch.float32)
        self._store(*gather_rows(feats.detach().to(wide), labels.to(torch.int64)))

    def _store(self, feats: Tensor, labels: Tensor) -> None:
        if labels.numel() == 0 or self.stamps.shape[0] == 0:
            return
        slots, newest = newest_rows(labels, feats, self.stamps.shape[0])
        known, before = newest >= 0, self.features[slots]
        unit = normalize_rows(feats)[newest.clamp(min=0)].to(self.features.dtype)
        self._note(slots, before)
        self.features.index_copy_(0, slots, torch.where(known[:, None], unit, before))
        stamps = torch.where(known, self._iteration, self.stamps[slots])
        self.stamps.index_copy_(0, slots, stamps)

    @never_compiled
    def _note(self, slots: Tensor, before: Tensor) -> None:
        self._moment = self._moment.then(slots, before)
