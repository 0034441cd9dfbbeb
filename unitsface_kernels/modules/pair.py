"""Sample-to-sample losses with their thresholds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..compiling import never_compiled
from ..distributed import collectives
from ..distributed.collectives import Group
from ..losses import circle, multi_similarity, pair_softmax, uss
from ..memory import all_finite
from .registered import RegisteredLoss, host_number

_USS, _SOFTMAX = uss.SPEC.default, pair_softmax.SPEC.default
_CIRCLE, _MULTI_SIMILARITY = circle.SPEC.default, multi_similarity.SPEC.default


class RegisteredGroupLoss(RegisteredLoss):
    """A loss that may compare with what other ranks of a group have."""

    group: Group
    exchange: str

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self._keep(given)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copies, as of averaged weights, stay in the same group, which cannot be copied."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.group)] = self.group
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


class RegisteredPairLoss(RegisteredGroupLoss):
    """A loss over the pairs of the own batch or of all ranks of a group."""

    scale: float | Tensor
    threshold: nn.Parameter

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
        batch_offset: int | None = None,
    ) -> Tensor:
        return self._compare(feats, labels, memory, memory_labels, batch_offset)

    def _compare(
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None,
        memory_labels: Tensor | None,
        batch_offset: int | None,
        **variables: float | Tensor,
    ) -> Tensor:
        batch = {
            "feats": feats,
            "labels": labels,
            "memory": memory,
            "memory_labels": memory_labels,
            "batch_offset": batch_offset,
            **variables,
        }
        return self.function(**batch, **self._thresholds(batch), **self._keywords())

    def _thresholds(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The function's threshold, if it has one, before the loss of ``batch``."""
        return {} if self.spec.threshold == "none" else {"b": self.threshold}


class _ThresholdLoss(RegisteredPairLoss):
    """A loss of pairs on either side of learnable thresholds, in logit units."""

    initialized: Tensor
    init_threshold: float | None

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.init_threshold = given["init_threshold"]
        if self.init_threshold is not None:
            # Tensors and NumPy numbers convert; so does text, which is refused.
            as_it_is = isinstance(self.init_threshold, (int, float, str, bytes, bytearray))
            number = self.init_threshold if as_it_is else float(self.init_threshold)
            validate.number("init_threshold", number)
        shape = (given["num_identities"],) if self.spec.threshold == "per_column" else ()
        self.threshold = nn.Parameter(torch.empty(shape))
        self.register_buffer("initialized", torch.tensor(False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A threshold without a first value is 0 until the first batch in training mode."""
        self.reset_numbers()
        nn.init.constant_(self.threshold, self.init_threshold or 0.0)
        self.initialized.fill_(self.init_threshold is not None)
        # The buffer is for state dicts; reading it would synchronize at every step.
        self._waiting = self.init_threshold is None

    @never_compiled
    @torch.no_grad()
    def _initialize(self, **batch: Any) -> None:
        first = functional.uss_threshold_init(
            **batch,
            scale=host_number(self.scale),
            backend=self.backend,
            group=self.group,
            exchange=self.exchange,
        )
        # Exactly 0: no negatives yet, as with an empty memory. Data parallelism averages gradients,
        # not parameters: the first value must be the same on all ranks. In a group it already is.
        some = first.isfinite() & (first != 0)
        # The first value does not depend on positives; the loss, and so the step, does.
        finite = first.isfinite() & all_finite(batch["feats"], batch["labels"])
        if batch["memory"] is not None:
            finite &= all_finite(batch["memory"], batch["memory_labels"])
        found = torch.stack([first.where(some, 0.0), some.to(first), (~finite).to(first)])
        if self.group is None:
            found = collectives.mean_over_ranks(found)
        else:
            found[2] = collectives.mean_over_ranks(found[2], self.group)
        value, ranks, broken = found.tolist()
        if ranks > 0 and not broken:
            self.threshold.fill_(value / ranks)
            self.initialized.fill_(True)
            self._waiting = False

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._waiting = not bool(self.initialized)

    def _thresholds(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self._waiting and self.training:
            self._initialize(**batch)
        return {"b": self.threshold}

    def _shown(self) -> dict[str, Any]:
        start = {"init_threshold": self.init_threshold}
        return {**self.values(), **start, **super()._shown()}


class USSLoss(_ThresholdLoss):
    """USS with its learnable threshold; see :func:`fused_uss_loss`.

    Args:
        scale, margin, reduction, backend, skip_tolerance, group, exchange: as the function's.
        init_threshold: first value of b, in logit units. None: :func:`uss_threshold_init` of the
            first batch in training mode that has negatives and is finite, averaged over ranks, or
            of the batches of ``group`` together; ``torch.compile(fullgraph=True)`` needs a value or
            such a batch before.

    Attributes:
        threshold: () parameter b; the unified cosine threshold is ``threshold / scale``.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.

    Raises:
        TypeError, ValueError: a wrong init_threshold; from a call, as the function.
    """

    loss = "uss"

    def __init__(
        self,
        scale: float | Tensor = _USS.scale,
        margin: float | Tensor = _USS.margin,
        init_threshold: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())


class PairBCELoss(_ThresholdLoss):
    """Pair BCE with a learnable threshold per identity; see :func:`fused_pair_bce_loss`.

    Args:
        num_identities: K.
        scale, margin, reduction, backend, skip_tolerance, group, exchange: as the function's.
        init_threshold: first value of every threshold, in logit units. None:
            :func:`uss_threshold_init` of the first batch in training mode that has negatives and
            is finite, averaged over ranks, or of the batches of ``group`` together;
            ``torch.compile(fullgraph=True)`` needs a value or such a batch before.

    Attributes:
        threshold: (K,) parameter b.

    Shape:
        feats (N, D), labels (N,) in [0, K) or -1, and optionally memory (M, D),
        memory_labels (M,) and the int batch_offset -> () float32.

    Raises:
        TypeError, ValueError: wrong num_identities or init_threshold; from a call, as the function.
    """

    loss = "pair_bce"

    def __init__(
        self,
        num_identities: int,
        scale: float | Tensor = _USS.scale,
        margin: float | Tensor = _USS.margin,
        init_threshold: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        validate.positive_int("num_identities", num_identities)
        super().__init__(locals())

    def _shown(self) -> dict[str, Any]:
        return {"num_identities": self.threshold.numel(), **super()._shown()}


class PairSoftmaxLoss(RegisteredPairLoss):
    """Softmax over pairs of samples; see :func:`fused_pair_softmax_loss`. It has no parameters.

    Args:
        scale, margin, reduction, backend, group, exchange: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.
    """

    loss = "pair_softmax"

    def __init__(
        self,
        scale: float | Tensor = _SOFTMAX.scale,
        margin: float | Tensor = _SOFTMAX.margin,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())


class CircleLoss(RegisteredPairLoss):
    """Circle over pairs of samples; see :func:`fused_circle_loss`. It has no parameters.

    Args:
        scale, margin, reduction, backend, group, exchange: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.
    """

    loss = "circle"

    def __init__(
        self,
        scale: float | Tensor = _CIRCLE.scale,
        margin: float | Tensor = _CIRCLE.margin,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())


class MultiSimilarityLoss(RegisteredPairLoss):
    """Multi-Similarity; see :func:`fused_multi_similarity_loss`. It has no parameters.

    Args:
        alpha, beta, base, reduction, backend, group, exchange: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.
    """

    loss = "multi_similarity"

    def __init__(
        self,
        alpha: float | Tensor = _MULTI_SIMILARITY.alpha,
        beta: float | Tensor = _MULTI_SIMILARITY.beta,
        base: float | Tensor = _MULTI_SIMILARITY.base,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())
