"""Cross-batch memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import validate
from ...memory import all_finite, nan_unless
from . import indices
from .base import labels_of
from .pair_loss import PairLoss

#: Losses of the original that it accepts there.
_SUPPORTED = (
    *("AngularLoss", "CircleLoss", "ContrastiveLoss", "GeneralizedLiftedStructureLoss"),
    *("IntraPairVarianceLoss", "LiftedStructureLoss", "MarginLoss", "MultiSimilarityLoss"),
    *("NCALoss", "NTXentLoss", "SignalToNoiseRatioContrastiveLoss", "SupConLoss"),
    *("TripletMarginLoss", "TupletMarginLoss"),
)


class CrossBatchMemory(nn.Module):
    """A loss between a batch and the newest embeddings, the batch's own included.

    A batch with NaN or infinity is compared, so that its loss is NaN, but not held.

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.

    Args:
        loss: a loss over pairs of this package, or one that the original's memory takes, which
            gets a list of all pairs.
        embedding_size: D.
        memory_size: how many embeddings are held.
        miner: a miner of the original, called with the batch and the memory. The loss is then
            that of the pairs that it lists.

    Attributes:
        embedding_memory: (memory_size, D) buffer, in the dtype of the last batch.
        label_memory: (memory_size,) int64 buffer.
        queue_idx, has_been_filled: the next batch's place, and whether the whole buffers are in
            use. Both are part of the state dict; the original's has neither, and loading it starts
            with an empty memory, as there.
        curr_batch_idx: (N,) places of the last batch.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: Any = None
    ) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss):
            self.check_loss_support(type(loss).__name__)
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("memory_size", memory_size)
        if miner is not None and not callable(miner):
            raise TypeError(f"miner must be callable, got {type(miner).__name__}")
        self.loss = loss
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.miner = miner
        self.register_buffer("embedding_memory", torch.zeros(memory_size, embedding_size))
        self.register_buffer("label_memory", torch.zeros(memory_size, dtype=torch.int64))
        self.curr_batch_idx = torch.zeros(0, dtype=torch.int64)
        self.reset_queue()

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the original's losses that it takes."""
        return list(_SUPPORTED)

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if loss_name not in _SUPPORTED:
            raise TypeError(
                "loss must be an NTXentLoss, a SupConLoss or another one over pairs, "
                f"got {loss_name}"
            )

    def reset_queue(self) -> None:
        self.embedding_memory = torch.zeros_like(self.embedding_memory)
        self.label_memory = torch.zeros_like(self.label_memory)
        self.queue_idx = 0
        self.has_been_filled = False

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        """Stores the batch, then compares each sample with the memory, itself excluded.

        With ``enqueue_mask``, (N,) of bool, the samples where it is true are stored and only the
        others are compared. Pairs of ``indices_tuple`` are compared besides, or besides those of
        the miner; their columns are places in the memory.
        """
        validate.features("embeddings", embeddings)
        labels = labels_of("labels", labels, embeddings, "embeddings").to(torch.int64)
        validate.width("embeddings", embeddings, self.embedding_size)
        queued, queued_labels = embeddings, labels
        if enqueue_mask is not None:
            if indices_tuple is not None:
                raise ValueError(
                    "indices_tuple must be None with an enqueue_mask, got "
                    f"{type(indices_tuple).__name__}"
                )
            enqueue_mask = _mask(enqueue_mask, len(embeddings)).to(embeddings.device)
            queued, queued_labels = embeddings[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        validate.at_most("the number of queued embeddings", len(queued), self.memory_size)
        start = self.queue_idx
        finite = all_finite(queued)
        if enqueue_mask is not None:
            # A batch kept out of the memory must still make the loss NaN.
            embeddings = embeddings + nan_unless(finite, embeddings.dtype)
        # Synchronizes only while the memory is empty and has no rows to keep in the batch's place.
        if not (self.has_been_filled or start or bool(finite)):
            return self.loss(embeddings, labels)
        self._enqueue(queued.detach(), queued_labels, finite)
        if self.has_been_filled:
            columns, column_labels = self.embedding_memory, self.label_memory
        else:
            columns = self.embedding_memory[: self.queue_idx]
            column_labels = self.label_memory[: self.queue_idx]
        if self.miner is None and indices_tuple is None and isinstance(self.loss, PairLoss):
            if enqueue_mask is not None:
                return self.loss.compare(embeddings, labels, columns, column_labels, None)
            if start + len(queued) > self.memory_size:
                # The batch wraps around the end; turned, the ring has it in one piece.
                columns, column_labels = columns.roll(-start, 0), column_labels.roll(-start)
                start = 0
            return self.loss.compare(embeddings, labels, columns, column_labels, start)
        found = self.create_indices_tuple(
            embeddings, labels, columns, column_labels, indices_tuple, enqueue_mask is None
        )
        return self.loss(embeddings, labels, found, columns, column_labels)

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:
        """The miner's pairs, or all, with those given; a list as miners return them."""
        if self.miner is None:
            found = indices.all_pairs(labels, L_mem)
        else:
            mined = self.miner(embeddings, labels, E_mem, L_mem)
            found = indices.checked(mined, len(embeddings), len(E_mem), embeddings.device)
        if do_remove_self_comparisons:
            found = indices.without_copies(found, self.curr_batch_idx.to(embeddings.device))
        if input_indices_tuple is not None:
            sizes = len(embeddings), len(E_mem)
            given = indices.checked(input_indices_tuple, *sizes, embeddings.device)
            found = indices.joined(found, given)
        return found

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Stores ``batch_size`` embeddings, all that are given."""
        validate.at_most("batch_size", batch_size, len(embeddings))
        queued = embeddings[:batch_size].detach()
        self._enqueue(queued, labels[:batch_size], all_finite(queued))

    def _enqueue(self, embeddings: Tensor, labels: Tensor, finite: Tensor) -> None:
        """A batch that is not finite advances the ring and keeps the samples in its place."""
        end = self.queue_idx + len(labels)
        place = torch.arange(self.queue_idx, end, device=labels.device) % self.memory_size
        self.curr_batch_idx = place
        held = place if self.has_been_filled else place % max(self.queue_idx, 1)
        embeddings = embeddings.where(finite, self.embedding_memory.to(embeddings)[held])
        labels = labels.where(finite, self.label_memory.to(labels)[held])
        # New tensors: a loss whose backward pass is still to come holds the old ones.
        self.embedding_memory = self.embedding_memory.to(embeddings).index_copy(
            0, place, embeddings
        )
        self.label_memory = self.label_memory.to(labels).index_copy(0, place, labels)
        self.queue_idx = end % self.memory_size
        self.has_been_filled = self.has_been_filled or end >= self.memory_size

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.queue_idx = state["queue_idx"]
        self.has_been_filled = state["has_been_filled"]

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        empty = {"queue_idx": 0, "has_been_filled": False}
        state_dict.setdefault(f"{prefix}_extra_state", empty)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"


def _mask(value: object, count: int) -> Tensor:
    mask = validate.is_tensor("enqueue_mask", value)
    if mask.dtype != torch.bool:
        raise TypeError(f"enqueue_mask must have dtype bool, got {mask.dtype}")
    if tuple(mask.shape) != (count,):
        raise ValueError(f"enqueue_mask must have shape ({count},), got {tuple(mask.shape)}")
    return mask
