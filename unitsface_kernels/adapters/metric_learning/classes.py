"""CosFace and ArcFace."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional, validate
from . import arguments


class _ClassLoss(nn.Module):
    """Margin softmax with the class weights in the original's layout, (D, C).

    Args:
        num_classes, embedding_size: C, D.
        margin, scale: of the loss.
        weight_init_func: fills the weights in place; N(0, 1) without it.
        backend: "auto", "native", "triton" or "reference".
        options: the original's other keywords, of which only the defaults can be had.

    Attributes:
        W: (D, C) parameter.

    Shape:
        embeddings (N, D), labels (N,) integers in [0, C) -> () float32, the mean over the batch.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float,
        scale: float,
        weight_init_func: Callable[[Tensor], object] | None,
        backend: str,
        options: dict[str, object],
    ) -> None:
        super().__init__()
        validate.positive_int("num_classes", num_classes)
        validate.positive_int("embedding_size", embedding_size)
        arguments.options_of_original(options, "MeanReducer")
        self.num_classes = num_classes
        self.margin = margin
        self.scale = scale
        self.backend = backend
        weight = torch.empty(embedding_size, num_classes)
        (weight_init_func or nn.init.normal_)(weight)
        # In memory (C, D), which is what the kernels read: transposing it back copies nothing.
        self.W = nn.Parameter(weight.t().contiguous().t())

    def _margins(self) -> tuple[float, float]:
        """m2 and m3 of :func:`fused_margin_softmax_loss`."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        ref_emb: None = None,
        ref_labels: None = None,
    ) -> Tensor:
        labels = arguments.batch(embeddings, labels, indices_tuple)
        for name, value in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            arguments.unsupported(name, value, "the columns are the class weights")
        validate.in_range("labels", labels, 0, self.num_classes)
        m2, m3 = self._margins()
        return functional.fused_margin_softmax_loss(
            embeddings,
            self.W.t(),
            labels,
            scale=self.scale,
            m2=m2,
            m3=m3,
            backend=self.backend,
        )

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) scaled cosines without margin, in the embeddings' dtype."""
        validate.features("embeddings", embeddings)
        weight = self.W.to(embeddings.dtype)
        return F.normalize(embeddings) @ F.normalize(weight, dim=0) * self.scale

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.W.shape[0]}, "
            f"margin={self.margin}, scale={self.scale}, backend={self.backend!r}"
        )


class CosFaceLoss(_ClassLoss):
    """Additive cosine margin; see :class:`_ClassLoss`."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        *,
        weight_init_func: Callable[[Tensor], object] | None = None,
        backend: str = "auto",
        **options,
    ) -> None:
        super().__init__(
            num_classes, embedding_size, margin, scale, weight_init_func, backend, options
        )

    def _margins(self) -> tuple[float, float]:
        return 0.0, self.margin


class ArcFaceLoss(_ClassLoss):
    """Additive angular margin; see :class:`_ClassLoss`.

    The margin is given in degrees; the attribute, as in the original, has it in radians. Targets
    with an angle past pi - margin get the continuous decreasing logit of this package,
    s (-cos(theta + margin) - 2), where the original jumps to s (cos theta - margin sin margin).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        *,
        weight_init_func: Callable[[Tensor], object] | None = None,
        backend: str = "auto",
        **options,
    ) -> None:
        validate.number("margin", margin)
        margin = math.radians(margin)
        super().__init__(
            num_classes, embedding_size, margin, scale, weight_init_func, backend, options
        )

    def _margins(self) -> tuple[float, float]:
        return self.margin, 0.0
