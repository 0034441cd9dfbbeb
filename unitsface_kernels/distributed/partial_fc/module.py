"""Class weights sharded over ranks, with any class loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import dispatch, validate
from ...backends.streaming import CallConfig, CallTensors
from ...compiling import never_compiled
from ...functional.call import matmul_dtype
from ...functional.variables import needs_gradient
from ...modules import CLASS_LOSSES
from ...modules.class_loss import Comparison, RegisteredClassLoss, ShardableLoss, check_stored
from ...modules.custom import ClassLoss
from ...policy import Class
from ..agreement import agree
from ..batch import Batch
from ..collectives import Group, own_rank, start_gather_rows, world_size
from . import anchors
from .autograd import Step, Task, sharded_loss
from .checks import formula, refuse_reference
from .fused import Fusion
from .sampling import sample_classes
from .shard import Shard
from .variables import of_step, packed, resolved

#: Losses that can be sharded, by name.
SHARDABLE = dict(CLASS_LOSSES)

#: Arguments of a call: feats, labels, momentum_feats and variables.
Given = tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]


class PartialFC(nn.Module):
    r"""A class loss whose classes are spread over the ranks of a process group.

    Rank r of W holds ``C // W + (r < C % W)`` consecutive classes. The features of all ranks are
    gathered once, every rank compares all of them with its own classes, a few numbers per row are
    merged (maxima and sums of the softmax, the nearest classes), and the gradient of the features
    returns by reduce-scatter. Neither the N x C matrix nor a copy of the class weights is stored.

    With ``sample_rate < 1`` a training step compares with the classes of the gathered batch and
    with uniformly drawn others, ``int(sample_rate * shard)`` rows of each shard in all (more if the
    batch alone has more). The draw is a function of (seed, rank, step).

    **Contract**: after data-parallel averaging of the backbone's gradients
    (``DistributedDataParallel``), losses, gradients and weights are those of one process that
    holds all classes and takes the concatenated batch. Batches may differ in size and be empty.
    Do not wrap this module in ``DistributedDataParallel``: it would take the shards for copies of
    each other. Gradients of thresholds that all ranks share are complete without it.

    Every rank must call it, with gradients enabled or disabled alike, and give a "mean" or "sum"
    the same upstream gradient. Without an initialized process group it holds all classes, and
    ``sample_rate`` and :meth:`fuse` work as described.

    Source: An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCVW
    2021; "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs
    by Partial FC", CVPR 2022.

    Args:
        loss: name in ``CLASS_LOSSES`` ("cosface", "arcface", "uce", "class_bce", "sphereface2",
            "npt", "epl", "unpg", "vpl", "proxy_anchor", ...), or an instance of a
            ``policy.Class``. "proxy_anchor", whose classes have the losses, is not fused, keeps
            unit vectors of the classes that take part, and of sampled ones a copy.
        embedding_size: D.
        num_classes: C, of all ranks together.
        sample_rate: r in (0, 1]. The thresholds of "uce" and "class_bce" start at log(10 r C), as
            published (CVI-SZU/UniFace).
        seed: of the initial weights, which do not depend on the number of ranks, and of the draws;
            the same on all ranks.
        group: process group; None: the default group.
        device: of the parameters.
        options: keywords of the loss's module (scale, margin, init_std, reduction, backend, ...);
            of a policy those of :class:`ClassLoss`.
            "mean" and "sum" are over the rows of all ranks; "none" gives the (n,) losses of the
            rank's own rows, and the objective is then the mean over ranks of what each makes of
            them.

    Attributes:
        name: of the loss.
        loss: the loss's module, whose per-class parameters and buffers are this rank's part.
        shard: which classes those are.
        step: training steps so far; part of the state dict.
        per_class: names in the state dict of the tensors that are sharded.

    Shape:
        feats (n, D), labels (n,) integers in [0, C) or -1, for "vpl" optionally momentum_feats
        (n, D) -> () float32, the same on every rank.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, range or name, on the rank itself and, named, on all others;
            ranks that disagree on classes, loss, seed, step or sample rate.
    """

    loss: ShardableLoss
    name: str
    embedding_size: int
    num_classes: int
    sample_rate: float
    seed: int
    group: Group
    shard: Shard
    step: int
    per_class: frozenset[str]

    def __init__(
        self,
        loss: str | Class,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        *,
        seed: int = 0,
        group: Group = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        own = isinstance(loss, Class)
        if not own:
            validate.choice("loss", loss, tuple(sorted(SHARDABLE)))
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        validate.number("sample_rate", sample_rate, above=0.0, at_most=1.0)
        validate.integer("seed", seed)
        validate.number("seed", seed, at_least=0, at_most=2**31 - 1)
        validate.process_group("group", group)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.seed, self.group = sample_rate, seed, group
        self.shard = Shard.of_rank(num_classes, own_rank(group), world_size(group))
        self.step = 0
        self.fusion: Fusion | None = None
        self._drawn = 0
        # All C classes, without memory for them.
        with torch.device("meta"):
            if isinstance(loss, Class):
                module: nn.Module = ClassLoss(loss, embedding_size, num_classes, **options)
            else:
                module = SHARDABLE[loss](embedding_size, num_classes, **options)
        assert isinstance(module, ShardableLoss)
        refuse_reference(module.backend)
        for comparison in module.comparisons():
            validate.parameters(comparison.spec, comparison.values)
        for part in module.modules():
            if isinstance(part, ShardableLoss):
                part.sample_rate = sample_rate
            if isinstance(part, ClassLoss):
                part.classes = slice(self.shard.start, self.shard.stop)
        self.name = type(loss).__name__ if isinstance(loss, Class) else loss
        # As text now: tensors of numbers may be on a device.
        self._options = str(sorted(options.items()))
        self.loss = module
        self.per_class = frozenset(
            name for name, tensor in self.state_dict().items() if self._per_class(tensor)
        )
        try:
            target = torch.get_default_device() if device is None else torch.device(device)
        except RuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(
                f"device must be a device such as 'cpu' or 'cuda:0': {reason}"
            ) from error
        self._materialize(target)
        self.reset_parameters()

    def _materialize(self, device: torch.device) -> None:
        for module in self.loss.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                shape = list(tensor.shape)
                if self._per_class(tensor):
                    shape[0] = len(self.shard)
                empty = torch.zeros(shape, dtype=tensor.dtype, device=device)
                if name in module._parameters:
                    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(self._mark_coalesced)
                    module._parameters[name] = parameter
                else:
                    module._buffers[name] = empty

    def _mark_coalesced(self, parameter: Tensor) -> None:
        """Accumulation clears the flag of a sparse gradient that its indices ascend.

        Its readers would sort and copy it. The sum of two has more entries than a draw.
        """
        gradient = parameter.grad
        if gradient is None or not gradient.is_sparse or gradient.sparse_dim() != 1:
            return
        if gradient._nnz() == self._drawn:
            parameter.grad = torch.sparse_coo_tensor(
                gradient._indices(),
                gradient._values(),
                gradient.shape,
                is_coalesced=True,
                check_invariants=False,
            )

    def _per_class(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == self.num_classes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values; those of a class do not depend on the number of ranks."""
        for path, module in self.loss.named_modules():
            if not isinstance(module, ShardableLoss):
                continue
            for name in module.random_rows:
                rows = getattr(module, name)
                width = math.prod(rows.shape[1:])
                blocks = self.shard.normal_rows(width, f"{path}.{name}", self.seed)
                for place, normal in blocks:
                    normal = normal.view(-1, *rows.shape[1:])
                    rows[place] = module.rows_from_normal(name, normal).to(rows)
            module.reset_numbers()
            module.reset_thresholds()

    @property
    def weight(self) -> Tensor:
        """(m, D) class weights of the shard; (m, K, D) of K centers each."""
        return self._head.weight

    @property
    def _head(self) -> RegisteredClassLoss:
        head = getattr(self.loss, "head", self.loss)
        assert isinstance(head, RegisteredClassLoss)
        return head

    def fuse(self, optimizer: torch.optim.Optimizer, when: str = "backward") -> None:
        """Makes the step of the class weights tile by tile, so that they have no gradient.

        Memory is that of the weights and of the optimizer's state alone; the gradient of a tile is
        computed again, four GEMMs instead of three. Thresholds keep their gradients.

        Args:
            optimizer: :class:`SampledSGD` or :class:`SampledAdamW` that holds the class weights.
                Learning rate, decay and state are its own, schedulers and state dicts work as
                ever.
            when: "backward": the backward pass moves the weights, ``optimizer.step()`` does not.
                "step": ``optimizer.step()`` moves them, at the cost of one more GEMM, for
                gradient scalers that skip steps and for :func:`clip_grad_norm_`. Either takes one
                backward pass per step.

        Raises:
            TypeError: another optimizer.
            ValueError: weights that are not the optimizer's, another word, or a loss whose classes
                have the losses ("proxy_anchor"): a class's gradient is complete after all samples.
        """
        from ...optim import SampledAdamW, SampledSGD

        validate.choice("when", when, ("backward", "step"))
        validate.instance(
            "optimizer", optimizer, (SampledSGD, SampledAdamW), "a SampledSGD or SampledAdamW"
        )
        for comparison in self.loss.comparisons():
            anchors.check_fusion(comparison.spec)
        weight = self.weight
        assert isinstance(weight, nn.Parameter)
        self.fusion = Fusion(weight, optimizer, when)

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        momentum_feats: Tensor | None = None,
        **variables: Tensor,
    ) -> Tensor:
        return self._forward((feats, labels, momentum_feats, variables))

    @never_compiled
    def _forward(self, call: Given) -> Tensor:
        feats, labels, momentum_feats, variables = call
        if world_size(self.group) == 1:
            wanted, count, _ = self._checked(call)
            counts = [count]
        else:
            wanted, counts = agree(lambda: self._checked(call), self.group)
        # On their way while the labels arrive and classes are drawn.
        arriving = start_gather_rows(feats, counts, self.group)
        every_label = start_gather_rows(labels.to(torch.int64), counts, self.group)()
        try:
            validate.in_range("labels", every_label, -1, self.num_classes)
            local = self.shard.local(every_label)
            index, positions = self._draw(local)
        finally:
            rows = arriving()
        if self.training:
            self.loss.begin_step(rows, local)
            # What the caller gives counts, as it does in evaluation.
            variables = of_step(self.loss, rows, local, index, counts, self.group) | variables
        batch = Batch(feats, labels, rows, every_label, counts, self.group)
        variables = self.loss.batch_variables(batch) | variables
        own = CallTensors(feats, labels, self.weight, column_index=index)
        loss = self._compare(own, rows, positions, counts, wanted, variables)
        if self.training:
            if momentum_feats is not None:
                rows = start_gather_rows(momentum_feats, counts, self.group)()
            self.loss.end_step(rows, local)
            self.step += 1
        return loss

    def _checked(self, call: Given) -> tuple[bool, int, dict[str, object]]:
        """Whether rows need a gradient, their number, and what must be the same on all ranks."""
        feats, labels, momentum_feats, variables = call
        validate.features("feats", feats)
        validate.width("feats", feats, self.embedding_size)
        validate.labels("labels", labels, feats.shape[0], feats)
        validate.same_device("feats", feats, "the class weights", self.weight)
        check_stored(self.loss, feats, momentum_feats)
        # "auto" resolves to it by the environment variable, or if nothing else is available.
        backend = dispatch.resolve(self.loss.backend, feats.device, feats.dtype)
        if backend == "reference":
            refuse_reference(backend, dispatch.why_reference(feats.device, feats.dtype))
        if not labels.is_cuda:
            validate.in_range("labels", labels, -1, self.num_classes)
        comparisons = resolved(self.loss, variables, feats)
        for comparison, given in comparisons:
            own = CallTensors(feats, labels, self.weight)
            packed(comparison, own, given)
            anchors.check_reduction(comparison.spec, self.loss.reduction)
        wanted = torch.is_grad_enabled() and feats.requires_grad
        same = {
            "loss": self.name,
            "options": self._options,
            "formula": formula(self.loss),
            "numbers in tensors": [comparison.spec.name for comparison, _ in comparisons],
            "num_classes": self.num_classes,
            "embedding_size": self.embedding_size,
            "sample_rate": self.sample_rate,
            "seed": self.seed,
            "step": self.step,
            "training": self.training,
            "dtype of feats": feats.dtype,
            "momentum_feats": None if momentum_feats is None else momentum_feats.dtype,
            "gradient of feats": wanted,
            "gradients of variables": [
                name for name, value in sorted(variables.items()) if needs_gradient(value)
            ],
        }
        return wanted, feats.shape[0], same

    def _draw(self, local: Tensor) -> tuple[Tensor | None, Tensor]:
        size = len(self.shard)
        if self.sample_rate == 1.0 or not self.training:
            return None, local
        rank = own_rank(self.group)
        count = int(self.sample_rate * size)
        index, positions = sample_classes(
            local, size, count, seed=self.seed, rank=rank, step=self.step
        )
        self._drawn = len(index)
        return index, positions

    def _compare(
        self,
        own: CallTensors,
        rows: Tensor,
        positions: Tensor,
        counts: list[int],
        need_rows: bool,
        variables: dict[str, Tensor],
    ) -> Tensor:
        feats, comparisons = own.rows, resolved(self.loss, variables, own.rows)
        step = Step(
            tasks=tuple(self._task(c, own, need_rows) for c, _ in comparisons),
            rows=rows,
            positions=positions,
            index=own.column_index,
            counts=counts,
            group=self.group,
        )
        parameters = [
            (c.columns, c.threshold, packed(c, own, given, step)) for c, given in comparisons
        ]
        return sharded_loss(step, feats, parameters)

    def _task(self, comparison: Comparison, own: CallTensors, need_rows: bool) -> Task:
        loss, spec, columns = self.loss, comparison.spec, comparison.columns
        feats = own.rows
        fused = self.fusion is not None and columns is self.weight
        config = CallConfig(
            spec,
            spec.pack(comparison.values),
            loss.reduction,
            dispatch.resolve(loss.backend, feats.device, feats.dtype),
            matmul_dtype(feats),
            # Every rank may leave out its part.
            skip_tolerance=loss.skip_tolerance / world_size(self.group),
            need_rows=need_rows,
        )
        return Task(
            config=config,
            share=comparison.share,
            sparse=isinstance(columns, nn.Parameter),
            fusion=self.fusion if fused and columns.requires_grad else None,
            anchors=anchors.of_step(spec, self.shard, own.column_index, self.group),
            mixing=comparison.mixing,
        )

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients that exist: of the shard, and of what all ranks share."""
        own: list[Tensor] = []
        shared: list[Tensor] = []
        for name, parameter in self.named_parameters():
            fused = self.fusion is not None and parameter is self.fusion.parameter
            if parameter.grad is None or fused:
                continue
            (own if name in self.per_class else shared).append(parameter.grad)
        return own, shared

    def get_extra_state(self) -> dict[str, object]:
        return {**self._identity(), "step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved shard has {name} = {state.get(name)}, this one has {value}; "
                    "unitsface_kernels.partial_fc.load_checkpoint loads checkpoints on another "
                    "number of ranks"
                )
        self.step = int(state["step"])

    def identity(self) -> dict[str, Any]:
        """Settings that a checkpoint and the loading module must share."""
        return {
            "loss": self.name,
            "num_classes": self.num_classes,
            "embedding_size": self.embedding_size,
            "seed": self.seed,
        }

    def _identity(self) -> dict[str, object]:
        """What a saved shard and the loading module must share."""
        of_shard = {"first class": self.shard.start, "classes of the shard": len(self.shard)}
        return {**self.identity(), **of_shard}

    def extra_repr(self) -> str:
        return (
            f"classes {self.shard.start}:{self.shard.stop} of {self.num_classes}, "
            f"embedding_size={self.embedding_size}, sample_rate={self.sample_rate}, "
            f"seed={self.seed}"
        )
