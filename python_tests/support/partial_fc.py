"""Training with sharded classes, and the same training by one process that holds them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unitsface_kernels as uk
from unitsface_kernels.distributed.batch import Batch
from unitsface_kernels.distributed.collectives import world_size
from unitsface_kernels.distributed.partial_fc.sampling import sample_classes
from unitsface_kernels.distributed.partial_fc.shard import Shard
from unitsface_kernels.functional.call import class_loss
from unitsface_kernels.modules.class_loss import Comparison, ShardableLoss

SIZE, CLASSES, ROWS = 16, 23, 12
# Rows of every rank: unequal, none, one.
COUNTS = {1: [12], 2: [5, 7], 3: [4, 0, 8], 4: [1, 4, 0, 7]}
SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2}
ADAMW = {"lr": 1e-3, "weight_decay": 1e-1}


@dataclass(frozen=True)
class Run:
    """A loss and how it is trained.

    Attributes:
        fuse: None, "backward" or "step".
        momentum: whether the loss stores features of another backbone.
    """

    loss: str
    options: dict[str, Any] = field(default_factory=dict)
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    fuse: str | None = None
    classes: int = CLASSES
    steps: int = 20
    max_norm: float | None = None
    momentum: bool = False

    def name(self) -> str:
        words = [self.loss, *(str(v) for v in self.options.values()), self.optimizer]
        if self.fuse:
            words.append(f"fused-{self.fuse}")
        if self.max_norm:
            words.append("clipped")
        if self.momentum:
            words.append("momentum")
        return f"{'-'.join(words)}-{self.sample_rate}-{self.classes}"


def batch(step: int, classes: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks; some rows ignored, classes repeated."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(ROWS, SIZE, generator=generator)
    return images, torch.randint(-1, classes, (ROWS,), generator=generator)


def backbone() -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    module = nn.Linear(SIZE, SIZE, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(SIZE, SIZE, generator=generator) / 4.0)
    return module


def of_another_backbone(images: Tensor) -> Tensor:
    return images.flip(1) + 0.25


def own_part(tensor: Tensor, rank: int, counts: list[int]) -> Tensor:
    start = sum(counts[:rank])
    return tensor[start : start + counts[rank]]


def optimizer_of(kind: str, parameters: list[nn.Parameter], sampled: bool) -> torch.optim.Optimizer:
    if kind == "sgd":
        return (uk.SampledSGD if sampled else torch.optim.SGD)(parameters, **SGD)
    return (uk.SampledAdamW if sampled else torch.optim.AdamW)(parameters, **ADAMW)


def sharded(rank: int, run: Run) -> dict[str, Any]:
    """Losses, and at the end parameters and optimizer state, of one rank."""
    counts = COUNTS[world_size()]
    head = uk.PartialFC(
        run.loss, SIZE, run.classes, sample_rate=run.sample_rate, seed=3, **run.options
    )
    body: nn.Module = backbone()
    if world_size() > 1:
        body = DistributedDataParallel(body)
    optimizer = optimizer_of(run.optimizer, [*body.parameters(), *head.parameters()], True)
    if run.fuse:
        head.fuse(optimizer, when=run.fuse)
    losses = []
    for step in range(run.steps):
        if hasattr(head.loss, "set_epoch"):
            head.loss.set_epoch(step // 4)
        images, labels = (own_part(t, rank, counts) for t in batch(step, run.classes))
        optimizer.zero_grad()
        kept = {"momentum_feats": of_another_backbone(images)} if run.momentum else {}
        loss = head(body(images), labels, **kept)
        loss.backward()
        if run.max_norm:
            uk.clip_grad_norm_(body.parameters(), run.max_norm, [head])
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, **_end(body, head.loss, optimizer)}


def single(run: Run, ranks: int) -> dict[str, Any]:
    """The same by one process: dense, eager, on the rows that the ranks draw."""
    module = uk.CLASS_LOSSES[run.loss](SIZE, run.classes, **run.options, backend="reference")
    assert isinstance(module, ShardableLoss)
    start_as_sharded(module, run.classes, run.sample_rate)
    body = backbone()
    learned = [*body.parameters(), *module.parameters()]
    optimizer = optimizer_of(run.optimizer, learned, False)
    losses = []
    for step in range(run.steps):
        if hasattr(module, "set_epoch"):
            module.set_epoch(step // 4)
        images, labels = batch(step, run.classes)
        index, positions = replayed(labels, run, ranks, step)
        feats = body(images)
        module.begin_step(feats.detach(), labels)
        module.drawn = index
        moved = module.step_variables(feats.detach(), labels, lambda t: t)
        moved |= module.batch_variables(Batch.alone(feats, labels))
        loss = sum(
            block.share * _loss_of(module, block, feats, positions, index, moved)
            for block in module.comparisons()
        )
        kept = of_another_backbone(images) if run.momentum else feats.detach()
        module.end_step(kept, labels)
        optimizer.zero_grad()
        loss.backward()
        if run.max_norm:
            nn.utils.clip_grad_norm_(learned, run.max_norm)
        before = _copy(optimizer, learned)
        optimizer.step()
        _restore_unsampled(before, optimizer, learned, index, run.classes)
        losses.append(loss.item())
    return {"losses": losses, **_end(body, module, optimizer)}


def _loss_of(
    module: ShardableLoss,
    block: Comparison,
    feats: Tensor,
    positions: Tensor,
    index: Tensor | None,
    moved: dict[str, Tensor],
) -> Tensor:
    """A loss of samples over classes, or of classes over samples."""
    given = feats, block.mixed_columns().clone(), positions
    options = {"class_index": index, "reduction": module.reduction, "backend": "reference"}
    if block.spec.topology == "pair":
        return getattr(uk, block.spec.function)(*given, **block.values, **options)
    return class_loss(
        block.spec,
        block.values,
        *given,
        block.threshold,
        **options,
        centers=block.columns.shape[1] if block.columns.dim() == 3 else 1,
        variables={**block.variables, **moved},
    )


def start_as_sharded(module: ShardableLoss, classes: int, sample_rate: float) -> None:
    """The initial values of ``PartialFC`` of one rank."""
    for path, part in module.named_modules():
        if isinstance(part, ShardableLoss):
            for name in part.random_rows:
                whole = getattr(part, name).data
                width = whole[0].numel()
                rows = Shard(classes, 0, classes).normal_rows(width, f"{path}.{name}", 3)
                for place, normal in rows:
                    normal = normal.view_as(whole[place])
                    whole[place] = part.rows_from_normal(name, normal)
            part.sample_rate = sample_rate
            part.reset_thresholds()


def replayed(labels: Tensor, run: Run, ranks: int, step: int) -> tuple[Tensor | None, Tensor]:
    """The rows that all ranks draw, in class order, and each label's place among them."""
    if run.sample_rate == 1.0:
        return None, labels
    drawn = []
    for rank in range(ranks):
        shard = Shard.of_rank(run.classes, rank, ranks)
        count = int(run.sample_rate * len(shard))
        local = shard.local(labels)
        index, _ = sample_classes(local, len(shard), count, seed=3, rank=rank, step=step)
        drawn.append(index + shard.start)
    index = torch.cat(drawn)
    places = torch.searchsorted(index, labels)
    return index, torch.where(labels < 0, -1, places)


def _copy(optimizer, learned) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [
        (
            p.detach().clone(),
            {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if torch.is_tensor(v)},
        )
        for p in learned
    ]


def _restore_unsampled(before, optimizer, learned, index, classes: int) -> None:
    """Training restricted to the sampled rows: nothing has happened to the others."""
    if index is None:
        return
    others = torch.ones(classes, dtype=torch.bool)
    others[index] = False
    for p, (value, state) in zip(learned, before, strict=True):
        if p.dim() == 0 or p.shape[0] != classes:
            continue
        p.data[others] = value[others]
        for key, now in optimizer.state[p].items():
            if torch.is_tensor(now) and now.dim() > 0:
                now[others] = state[key][others] if key in state else 0.0


def _end(body: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that training moved, by name."""
    found: dict[str, Any] = {}
    body = getattr(body, "module", body)
    for prefix, module in (("backbone", body), ("loss", loss)):
        for name, parameter in module.named_parameters():
            found[f"{prefix}.{name}"] = parameter.detach().clone()
            for key, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and value.dim() > 0:
                    found[f"{prefix}.{name} {key}"] = value.clone()
        for name, buffer in module.named_buffers():
            found[f"{prefix}.{name}"] = buffer.clone()
    return found


def joined(ranks: list[dict[str, Any]], classes: int) -> dict[str, Any]:
    """State of all ranks: shards in order, shared entries once, after checking that they agree."""
    result: dict[str, Any] = {}
    for key, first in ranks[0].items():
        if key == "losses" or not key.startswith("loss.") or first.dim() == 0:
            for other in ranks[1:]:
                same = other[key] == first if key == "losses" else torch.equal(other[key], first)
                assert same, f"{key} differs between ranks"
            result[key] = first
        else:
            result[key] = torch.cat([rank[key] for rank in ranks])
            assert result[key].shape[0] == classes
    return result


def compare(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Losses to 1e-5, all else to 1e-4 of its norm."""
    assert found.keys() == expected.keys(), what
    for a, b in zip(found["losses"], expected["losses"], strict=True):
        assert abs(a - b) <= 1e-5 * abs(b) + 1e-7, f"{what}: loss {a}, expected {b}"
    for key, value in expected.items():
        if key != "losses":
            error = torch.linalg.vector_norm((found[key] - value).double())
            norm = torch.linalg.vector_norm(value.double())
            assert error <= 1e-4 * norm + 1e-9, f"{what}: {key} is off by {error / norm:.1e}"
