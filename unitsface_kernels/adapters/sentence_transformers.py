"""Losses of sentence-transformers: their constructors, ``loss(sentence_features, labels)``.

The package need not be installed: a model is called with one dictionary of features for each column
of texts, and returns one with "sentence_embedding".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..distributed.collectives import Group, world_size


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of anchors against positives and hard negatives; see :func:`fused_info_nce_loss`.

    Args:
        model: of every column of texts: anchors, their positives and, optionally, columns of
            negatives.
        scale: > 0, one over the temperature.
        similarity_fct: None, or sentence-transformers' ``cos_sim``: similarities are cosines.
        gather_across_devices: candidates are those of all ranks of the default group. The loss is
            then the mean over all ranks' anchors, the same on every rank.
        directions, partition_mode, hardness_mode, hardness_strength: of later versions, of which
            the defaults can be had.
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: a wrong argument; from a call, as the function.
    """

    #: Also the loss of positives against anchors.
    both = False

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[..., Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        validate.number("scale", scale, above=0.0)
        validate.instance("gather_across_devices", gather_across_devices, bool, "a bool")
        name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        if similarity_fct is not None and name not in ("cos_sim", "pytorch_cos_sim"):
            raise ValueError(f"similarity_fct must be cos_sim: logits are cosines, got {name}")
        validate.choice("partition_mode", partition_mode, ("joint", "per_direction"))
        for option, value, default in (
            ("directions", tuple(directions), ("query_to_doc",)),
            ("hardness_mode", hardness_mode, None),
            ("hardness_strength", hardness_strength, 0.0),
        ):
            if value != default:
                raise ValueError(f"{option} must be {default}, got {value}")
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.backend = backend

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of (N, D) anchors, positives and columns of negatives; labels are not used."""
        if len(embeddings) < 2:
            raise ValueError(
                f"embeddings must be those of anchors and of positives, got {len(embeddings)}"
            )
        anchors, *candidates = embeddings
        group: Group = None
        if self.gather_across_devices and world_size() > 1:
            group = torch.distributed.group.WORLD
        return functional.fused_info_nce_loss(
            anchors,
            torch.cat(candidates),
            None,
            None,
            float(self.scale),
            both=self.both,
            group=group,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "similarity_fct": "cos_sim",
            "gather_across_devices": self.gather_across_devices,
        }

    def extra_repr(self) -> str:
        options = f"scale={self.scale}, gather_across_devices={self.gather_across_devices}"
        return f"{options}, backend={self.backend!r}"


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """The mean of the loss above and of that of every positive against all anchors."""

    both = True
