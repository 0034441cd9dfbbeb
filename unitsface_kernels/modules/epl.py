"""EPL: a class loss on class weights and on empirical prototypes of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validate
from ..backends.reference import normalize_rows
from ..distributed.collectives import gather_rows
from ..memory import newest_rows
from .bce import UCELoss
from .class_loss import Comparison
from .composed import ComposedLoss
from .margin_softmax import ArcFaceLoss, CosFaceLoss


class EPLLoss(ComposedLoss):
    r"""Empirical prototype learning over CosFace, ArcFace or UCE.

    Every class has a prototype :math:`P_c`, a running mean of its features without gradient. A
    training batch first moves the prototypes of its classes, with :math:`a` a function of the
    similarity,

    .. math:: a = \mathrm{softsign} \langle P_y, \hat x \rangle, \qquad
              P_y \leftarrow \mathrm{normalize}(a P_y + (1 - a) \hat x)

    (of several samples of a class the last one). The loss is then the mean of the head's loss on
    the class weights and its loss on the prototypes, where the target's cosine c first becomes
    c - k c, the second c taken as a constant, and then has the head's margin: over ArcFace (on the
    angle of c - k c) and UCE as on the class weights, over CosFace none. UCE's threshold is shared.

    Source: Fan et al., "EPL: Empirical Prototype Learning for Deep Face Recognition", arXiv
    2405.12447, and its published code, head_EPL.py of WakingHours-GitHub/EPL. That code clamps
    UCE's logits to [-s, s]; this module does not. Its ``l`` is ``negative_weight`` here, and its
    update "direct", a = 0, belongs to CosFace there.

    Args:
        embedding_size: D.
        num_classes: C.
        base: "cosface", "arcface" or "uce".
        scale: as of the base.
        margin: as of the base, for "arcface" in radians; None: 0.4, as published for all three.
        k: adaptive margin of the prototypes' targets.
        start_epoch: 0-based epoch, see :meth:`set_epoch`, from which the prototypes have a loss;
            until then they only move, and the loss is the head's.
        activation: "softsign"; "sigmoid" for the sigmoid of the similarity less 1; "direct" for
            a = 0: the prototype is the newest feature.
        reduction, backend, skip_tolerance: as of the base's function.
        margin_gradient: for "arcface": "detached", as published, or "exact".
        init_std: standard deviation of the initial class weights; None: the base's, 0.01 for
            "cosface" and "arcface". Published: D ** -0.5.
        negative_weight: over "uce": weight of the other classes, on class weights and prototypes.

    Attributes:
        head: the base's module with its (C, D) class weights (and threshold).
        prototypes: (C, D) buffer of unit rows, initialized in random directions.
        epoch: current epoch, part of the state dict.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or options; from a call, as the head.
    """

    loss = "epl"
    _heads: ClassVar = {"cosface": CosFaceLoss, "arcface": ArcFaceLoss, "uce": UCELoss}
    _shown = ("base", "k", "start_epoch", "activation")
    random_rows: tuple[str, ...] = ("prototypes",)
    prototypes: Tensor
    epoch: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        base: str = "cosface",
        scale: float | Tensor = 64.0,
        margin: float | None = None,
        k: float = 0.7,
        start_epoch: int = 3,
        activation: str = "softsign",
        reduction: str = "mean",
        backend: str = "auto",
        margin_gradient: str = "detached",
        init_std: float | None = None,
        skip_tolerance: float = 0.0,
        negative_weight: float | Tensor = 1.0,
    ) -> None:
        validate.choice("activation", activation, ("softsign", "sigmoid", "direct"))
        validate.number("k", k, at_least=0.0)
        validate.number("start_epoch", start_epoch, at_least=0)
        validate.choice("margin_gradient", margin_gradient, ("exact", "detached"))
        options: dict[str, Any] = {"margin_gradient": margin_gradient}
        if base == "uce":
            options = {"negative_weight": negative_weight}
        elif isinstance(negative_weight, Tensor) or negative_weight != 1.0:
            found = type(negative_weight).__name__
            found = found if isinstance(negative_weight, Tensor) else repr(negative_weight)
            raise ValueError(f"negative_weight must be 1 over {base!r}, got {found}")
        super().__init__(
            base,
            embedding_size,
            num_classes,
            scale=scale,
            margin=0.4 if margin is None else margin,
            reduction=reduction,
            backend=backend,
            init_std=init_std,
            skip_tolerance=skip_tolerance,
            **options,
        )
        self.k = k
        self.start_epoch = start_epoch
        self.activation = activation
        self.register_buffer("prototypes", torch.empty(num_classes, embedding_size))
        self.register_buffer("epoch", torch.tensor(0))
        # The buffer is for state dicts; reading it would synchronize at every step.
        self._epoch = 0
        self._reset_prototypes()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_prototypes()

    def _reset_prototypes(self) -> None:
        nn.init.normal_(self.prototypes)
        with torch.no_grad():
            self.prototypes.copy_(normalize_rows(self.prototypes))

    def set_epoch(self, epoch: int) -> None:
        """The trainer's 0-based epoch; decides whether the prototypes have a loss."""
        self.epoch.fill_(epoch)
        self._epoch = epoch

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._epoch = int(self.epoch)

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor) -> None:
        """Moves the prototypes of a batch; in a process group of every rank's batch."""
        wide = torch.promote_types(feats.dtype, torch.float32)
        self._move(*gather_rows(feats.detach().to(wide), labels.to(torch.int64)))

    def _move(self, feats: Tensor, labels: Tensor) -> None:
        if labels.numel() == 0 or self.prototypes.shape[0] == 0:
            return
        unit = normalize_rows(feats).to(self.prototypes.dtype)
        slots, newest = newest_rows(labels, feats, self.prototypes.shape[0])
        old = self.prototypes[slots]
        new = unit[newest.clamp(min=0)]
        momentum = self._share_of_old((old * new).sum(dim=1, keepdim=True))
        moved = normalize_rows(momentum * old + (1.0 - momentum) * new)
        self.prototypes.index_copy_(0, slots, torch.where(newest[:, None] >= 0, moved, old))

    def _share_of_old(self, similarity: Tensor) -> Tensor:
        if self.activation == "direct":
            return torch.zeros_like(similarity)
        if self.activation == "softsign":
            return F.softsign(similarity)
        return torch.sigmoid(similarity - 1.0)

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        loss = self.head(feats, labels)
        if self.training:
            self.update(feats, labels)
        if self._epoch < self.start_epoch:
            return loss
        return (loss + self._prototype_loss(feats, labels)) / 2.0

    @torch.no_grad()
    def begin_step(self, feats: Tensor, labels: Tensor) -> None:
        self._move(feats.float(), labels)

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        return normalize_rows(normal)

    def comparisons(self) -> list[Comparison]:
        (on_weights,) = self.head.comparisons()
        if self._epoch < self.start_epoch:
            return [on_weights]
        values = on_weights.values | {"adaptive_margin": self.k}
        if self.base == "cosface":
            values["m3"] = 0.0
        on_prototypes = replace(on_weights, values=values, columns=self.prototypes)
        return [replace(block, share=0.5) for block in (on_weights, on_prototypes)]

    def _prototype_loss(self, feats: Tensor, labels: Tensor) -> Tensor:
        _, block = self.comparisons()
        # A copy: the next batch moves them, and this one may not be differentiated yet.
        return self.head.compare(feats, block.columns.clone(), labels, **block.values)
