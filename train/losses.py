"""Losses by name, from the registries of ``unitsface_kernels``: a new loss there appears here."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

import unitsface_kernels as uk
from train.config import Config
from train.config.keys import names_class
from train.config.sections import NO_LOSS, LossConfig, PartialFCConfig, shardable_names
from train.distributed import lost_process
from train.errors import UserError, reported
from train.own_loss import MODULES, default_numbers, policy_and_options

REGISTRIES: dict[str, dict[str, Any]] = {"class": uk.CLASS_LOSSES, "pair": uk.PAIR_LOSSES}


# What the harness sets itself; `reduction`, since it needs one number per step.
_SET = ("embedding_size", "num_classes", "num_identities", "counts", "backend")
_SET += ("reduction", "group", "exchange")


def _parameters(cls: type) -> dict[str, Any]:
    """Names a constructor takes, with their defaults, following ``**kwargs`` up to the base
    classes' constructors.
    """
    found: dict[str, Any] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = [*inspect.signature(vars(base)["__init__"]).parameters.values()][1:]
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, parameter.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def _chosen(config: LossConfig, key: str) -> tuple[str, dict[str, Any]]:
    """Name of the class or the pair loss, and its options, of which learned numbers are parameters.

    Raises:
        UserError: the loss has no such option or number.
    """
    name, given, learned = (getattr(config, f"{key}_{p}") for p in ("name", "options", "learned"))
    if name == NO_LOSS:
        return name, {}
    if names_class(name):
        defaults = default_numbers(key, name)
    else:
        defaults = _parameters(REGISTRIES[key][name])
        accepted = [p for p in defaults if p not in _SET]
        for option in given:
            if option not in accepted:
                takes = ", ".join(accepted) or "no options"
                raise UserError(f"loss.{key}_options.{option}: {name} takes {takes}")
    settings = ("skip_tolerance", "init_std", "init_threshold")
    # What has no number as its default has one that depends on the others.
    values = {n: given.get(n, v) for n, v in defaults.items() if isinstance(v, float | None)}
    numbers = [n for n, v in values.items() if n not in settings and isinstance(v, float | int)]
    options = dict(given)
    for number in learned:
        if number not in numbers:
            has = ", ".join(numbers) or "none"
            raise UserError(f"loss.{key}_learned: {name} has the numbers {has}, got {number}")
        options[number] = nn.Parameter(torch.tensor(float(values[number])))
    return name, options


def _build(config: LossConfig, key: str, given: dict[str, Any]) -> nn.Module | None:
    """The class or the pair loss, passing of ``given`` only what its constructor takes."""
    name, options = _chosen(config, key)
    if name == NO_LOSS:
        return None
    cls: Any = REGISTRIES[key].get(name, MODULES[key])
    policy: list[Any] = []
    if names_class(name):
        *policy, options = policy_and_options(key, name, options)
    taken = {k: v for k, v in given.items() if k in _parameters(cls)}
    with reported(f"loss.{key}={name}", TypeError, ValueError):
        return cls(*policy, **taken, **options)


class FaceLoss(nn.Module):
    """Weighted sum of a class loss and a pair loss; either may be absent.

    With CosFace and USS at weights 1 this is ``UniTSFaceLoss``; the two terms are returned apart
    because they are logged apart.
    """

    def __init__(
        self,
        class_loss: nn.Module | None,
        pair_loss: nn.Module | None,
        class_weight: float = 1.0,
        pair_weight: float = 1.0,
        class_until_pairs: bool = False,
    ) -> None:
        super().__init__()
        self.class_until_pairs = class_until_pairs
        self.class_loss = class_loss
        self.pair_loss = pair_loss
        self.class_weight = class_weight
        self.pair_weight = pair_weight

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        pairs: bool = True,
        momentum_feats: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) features and (N,) labels to three scalars: total, class term, pair term.

        ``memory``, (M, D) features and (M,) labels, takes the batch's place as the columns of the
        pair loss; without ``pairs`` its term is left out. With ``class_until_pairs`` the class
        term is left out where the pair term is there. ``momentum_feats``: (N, D) features that the
        class loss stores in place of these.
        """

        def term(loss: nn.Module | None, wanted: bool, given: dict[str, Tensor]) -> Tensor:
            if loss is None:
                return torch.zeros((), device=features.device)
            return loss(features, labels, **given) if wanted else _nothing(loss, features.device)

        stored = {} if momentum_feats is None else {"momentum_feats": momentum_feats}
        columns = {} if memory is None else {"memory": memory[0], "memory_labels": memory[1]}
        class_term = term(self.class_loss, not (pairs and self.class_until_pairs), stored)
        pair_term = term(self.pair_loss, pairs, columns)
        total = self.class_weight * class_term + self.pair_weight * pair_term
        return total, class_term, pair_term

    def threshold(self) -> float | None:
        """The unified cosine threshold, the pair loss's if it has one; None without any."""
        return first_threshold(self.pair_loss, self.class_loss)


def learned_numbers(loss: FaceLoss, head: uk.PartialFC | None) -> dict[str, float]:
    """What the losses learn beside class weights and thresholds, one number each, by name."""
    modules = {"class": loss.class_loss if head is None else head.loss, "pair": loss.pair_loss}
    return {
        f"{key}.{name}": float(parameter.detach())
        for key, module in modules.items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.dim() == 0 and name.split(".")[-1] not in ("threshold", "bias")
    }


def _nothing(loss: nn.Module, device: torch.device) -> Tensor:
    """0 with gradients of zero for all parameters, from empty sums: data-parallel training waits
    for the gradient of every one.
    """
    empty = (p.flatten()[:0].sum() for p in loss.parameters())
    return sum(empty, torch.zeros((), device=device))


def set_epoch(losses: nn.Module, epoch: int) -> None:
    """Begin an epoch, from 0, in the losses that change with it."""
    for module in losses.modules():
        if hasattr(module, "set_epoch"):
            module.set_epoch(epoch)


def first_threshold(*losses: nn.Module | None) -> float | None:
    """The unified cosine threshold of the first loss that has one."""
    for loss in losses:
        # A loss built on another one keeps its threshold there.
        for module in () if loss is None else loss.modules():
            value = cosine_threshold(module)
            if value is not None:
                return value
    return None


def cosine_threshold(loss: nn.Module) -> float | None:
    """The cosine at which a loss's single threshold separates same from different.

    ``b / s`` where the logit is ``s cos - b``. SphereFace2's is ``s g(cos) + b`` with
    ``g(c) = 2 ((c + 1) / 2)^t - 1``, so there it is where ``g`` is ``-b / s``.
    """
    if isinstance(loss, uk.SphereFace2Loss):
        scale, t = (float(torch.as_tensor(loss.options[n]).detach()) for n in ("scale", "t"))
        level = (1.0 - float(loss.bias.detach()) / scale) / 2.0
        return 2.0 * max(0.0, level) ** (1.0 / t) - 1.0
    if isinstance(loss, (uk.PairLoss, uk.ClassLoss)):
        return None  # what a threshold means is up to the user's formula
    b, scale = getattr(loss, "threshold", None), getattr(loss, "scale", None)
    if isinstance(b, Tensor) and b.numel() == 1 and scale:
        return float(b.detach()) / float(torch.as_tensor(scale).detach())
    return None


def build_loss(
    config: LossConfig,
    num_classes: int,
    embedding_size: int,
    *,
    counts: Tensor | None = None,
    sharded: bool = False,
    group: Any = None,
) -> FaceLoss:
    """The losses of a configuration; class weights are (num_classes, embedding_size).

    Args:
        counts: (num_classes,) images of each, for losses with margins by them.
        sharded: the class loss is that of :func:`build_head`.
        group: pairs are those of the batches of all its processes.
    """
    given = {
        "embedding_size": embedding_size,
        "num_classes": num_classes,
        "num_identities": num_classes,
        "counts": counts,
        "backend": config.backend,
        "group": group if config.pair_across_ranks else None,
    }
    class_loss = None if sharded else _build(config, "class", given)
    weights = config.class_weight, config.pair_weight
    return FaceLoss(class_loss, _build(config, "pair", given), *weights, config.class_until_filled)


def shards_classes(loss: LossConfig, partial_fc: PartialFCConfig, processes: int) -> bool:
    """True where a configuration's class loss has its classes in shards, :func:`build_head`."""
    shardable = names_class(loss.class_name) or loss.class_name in shardable_names()
    if not shardable or partial_fc.enabled == "never" or loss.class_until_filled:
        return False
    asked = partial_fc.sample_rate < 1.0 or partial_fc.fused_optimizer != "none"
    return partial_fc.enabled == "always" or asked or processes > 1


def build_head(
    config: Config, num_classes: int, *, device: torch.device, counts: Tensor | None = None
) -> uk.PartialFC:
    """The class loss with its classes spread over all processes; ``counts``: as there."""
    name, options = _chosen(config.loss, "class")
    loss: Any = name
    if names_class(name):
        loss, options = policy_and_options("class", name, options)
    elif "counts" in _parameters(uk.CLASS_LOSSES[name]):
        options["counts"] = counts
    sizes = config.model.embedding_size, num_classes, config.partial_fc.sample_rate
    with reported(f"loss.class={name}", TypeError, ValueError):
        settings = {"seed": config.run.seed, "device": device, "backend": config.loss.backend}
        return uk.PartialFC(loss, *sizes, **settings, **options)


def headline(loss: LossConfig, device: torch.device) -> str:
    """The first line of a training: what computes, and which losses (section ``loss``)."""
    with reported("loss.backend", ValueError):
        backend = uk.resolve_backend(loss.backend, device, torch.float32)
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device
    names = [name for name in (loss.class_name, loss.pair_name) if name != NO_LOSS]
    return f"device {where}, loss backend {backend}, losses {' + '.join(names) or NO_LOSS}"


@torch.no_grad()
def try_loss(
    loss: FaceLoss, embedding_size: int, device: torch.device, head: uk.PartialFC | None = None
) -> None:
    """Call the losses once on two rows: what their options or their backend forbid shows up here,
    before a run folder exists, rather than at the first step.

    A copy is called: thresholds and prototypes that start from the first batch must not start from
    this one. It is gone before gradients and momentum need more than its memory. Of a head, for
    whose copy there is no memory, a call without training changes nothing.
    """
    # A process group is no part of the copy, and cannot be copied.
    groups = [module.group for module in loss.modules() if hasattr(module, "group")]
    loss = copy.deepcopy(loss, {id(group): group for group in groups})
    features = torch.ones(2, embedding_size, device=device)
    try:
        for pairs in (True, False) if loss.class_until_pairs else (True,):
            loss(features, torch.tensor([0, 1], device=device), pairs=pairs)
        if head is not None:
            head.eval()
            head(features, torch.tensor([0, 0], device=device))
            head.train()
    except (TypeError, ValueError, RuntimeError) as error:
        if lost_process(error):
            raise
        raise UserError(f"loss: {error}") from error
