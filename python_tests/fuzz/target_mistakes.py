"""Legal calls with one wrong argument: a TypeError or a ValueError of one line, and no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import unitsface_kernels as uk
from unitsface_kernels.adapters import metric_learning
from unitsface_kernels.losses import REGISTRY

from .draw import Source

N, M, D = 4, 5, 8


def _wrong_anything(s: Source) -> list[Any]:
    return ["text", object(), [1], b"1", {}]


def _wrong_tensors(x: Tensor) -> list[Any]:
    """Instead of a tensor ``x``."""
    found: list[Any] = [
        x.to_sparse(),
        x.to("meta"),
        x.to(torch.complex64),
        x.to(torch.bool),
        torch.nested.nested_tensor([x, x]),
        nn.UninitializedParameter(),
        x.tolist(),
        x[None, ..., None],
    ]
    if x.dim() == 2:
        found += [x.to_sparse_csr(), x[:, :-1], x[:, :0], x[0], x.to(torch.int64)]
        found += [x.to(torch.float8_e4m3fn), torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)]
    elif not x.is_floating_point():
        found += [x.float(), x[:-1], torch.cat([x, x]), x - 2**40, x.to(torch.uint32)]
    return found


WRONG_NUMBERS = [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, -(10**5000), True, 1j, "1"]
WRONG_NUMBERS += [None, [1.0], torch.ones(2)]
WRONG_INTEGERS = [2**63, -(2**70), 10**5000, 1.0, True, "1", math.nan, torch.ones(2)]


def _calls() -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Public entry points with legal arguments."""
    feats, labels = torch.randn(N, D), torch.arange(N) // 2
    pair = {"feats": feats, "labels": labels, "memory": torch.randn(M, D)}
    pair |= {"memory_labels": torch.arange(M)}
    classes = {"feats": feats, "weight": torch.randn(M, D), "labels": labels}
    found: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
    for spec in REGISTRY.values():
        arguments = dict(pair if spec.topology == "pair" else classes)
        if spec.threshold != "none":
            arguments["b"] = torch.zeros(() if spec.threshold == "scalar" else M)
        numbers = {p.name: p.default for p in spec.parameters if not p.choices}
        numbers |= {v.name: 0.5 for v in spec.variables if v.given}
        if spec.topology == "pair":
            numbers["batch_offset"] = 0
        words = {"reduction": "mean", "backend": "auto"}
        found.append((spec.function, getattr(uk, spec.function), arguments | numbers | words))
    found.append(("uss_threshold_init", uk.uss_threshold_init, pair | {"scale": 64.0}))
    found.append(
        ("uss float b", uk.fused_uss_loss, pair | {"b": 1.0, "backend": "reference"}),
    )
    metric = {"feats": feats, "labels": labels, "other": pair["memory"]}
    metric |= {"other_labels": pair["memory_labels"], "backend": "auto"}
    found += [
        ("pair_histogram", uk.metrics.pair_histogram, metric | {"bins": 7}),
        ("tar_at_far", uk.metrics.tar_at_far, metric | {"far": 0.1}),
        ("best_threshold", uk.metrics.best_threshold, metric | {"accuracy": "plain"}),
        ("threshold_gap", uk.metrics.threshold_gap, metric | {"b": 1.0, "scale": 64.0}),
        ("identity_thresholds", uk.metrics.identity_thresholds, metric | {"bins": 7}),
        (
            "classification_accuracy",
            uk.metrics.classification_accuracy,
            classes | {"scale": 2.0, "bias": 1.0, "backend": "auto"},
        ),
    ]
    for name, cls in uk.CLASS_LOSSES.items():
        made = {"embedding_size": D, "num_classes": M}
        found.append((f"make {name}", cls, made))
        found.append((name, cls(**made), {"feats": feats, "labels": labels}))
    for name, cls in uk.PAIR_LOSSES.items():
        more = [M] if name == "pair_bce" else []
        found.append((name, cls(*more, init_threshold=1.0) if more else cls(), pair))
    head = {"loss": "cosface", "embedding_size": D, "num_classes": M, "sample_rate": 0.5, "seed": 1}
    found.append(("make PartialFC", uk.PartialFC, head))
    for rate in (1.0, 0.5):
        module = uk.PartialFC("uce", D, M, rate)
        found.append(("PartialFC", module, {"feats": feats, "labels": labels}))
    found.append(("make FeatureMemory", uk.FeatureMemory, {"num_identities": M, "dim": D}))
    memory = uk.FeatureMemory(M, D)
    found.append(("FeatureMemory", memory.update, {"feats": feats, "labels": labels}))
    found.append(("make NTXent", metric_learning.NTXentLoss, {"temperature": 0.1}))
    for name in ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "CircleLoss"):
        module = getattr(metric_learning, name)()
        given = {"embeddings": feats, "labels": labels}
        found.append((f"metric_learning.{name}", module, given))
    found.append(("make USS", uk.USSLoss, {"init_threshold": 1.0}))
    return found


#: What may be left out, or anything: None is legal there.
OPTIONAL = {"memory", "memory_labels", "batch_offset", "other", "other_labels", "bias"}
OPTIONAL |= {"init_threshold"}
INTEGERS = {"batch_offset", "k", "bins", "embedding_size", "num_classes", "seed", "num_identities"}
INTEGERS |= {"dim"}


def _wrong(s: Source, name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if name == "b" and s.chance(0.5):
            return s.pick([v for v in WRONG_NUMBERS if not isinstance(v, Tensor)])
        return s.pick([*_wrong_anything(s), *_wrong_tensors(value), None])
    if isinstance(value, str):
        return s.pick([*_wrong_anything(s), torch.ones(2), None, 1])
    if name in INTEGERS:
        return s.pick([*_wrong_anything(s), *WRONG_INTEGERS, None])
    if name == "init_threshold":
        return s.pick([*_wrong_anything(s), *WRONG_NUMBERS[:7]])
    return s.pick([*_wrong_anything(s), *WRONG_NUMBERS])


def _legal_after_all(entry: str, name: str, wrong: Any) -> bool:
    """Where what is wrong elsewhere is right."""
    if wrong is None and name in (*OPTIONAL, "weight"):
        return True
    if name == "far" and isinstance(wrong, list):
        return True
    if name == "b" and type(wrong) is float:
        return abs(wrong) < 1.0  # of a scalar as a list
    plain = isinstance(wrong, Tensor) and not isinstance(wrong, nn.UninitializedParameter)
    if name == "embeddings" and plain and wrong.dim() == 2:
        # Any width.
        return wrong.dtype == torch.float32 and wrong.layout == torch.strided and wrong.shape[1] > 0
    if name == "labels" and entry.startswith("metric_learning."):
        # Any integers, from any device.
        return isinstance(wrong, Tensor) and (wrong.dtype == torch.int64 or wrong.is_meta)
    return False


def run_one(seed: int) -> str | None:
    s = Source(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    entry, call, arguments = s.pick(_calls())
    name = s.pick(sorted(arguments))
    wrong = _wrong(s, name, arguments[name])
    if _legal_after_all(entry, name, wrong):
        return None
    try:
        call(**{**arguments, name: wrong})
    except (TypeError, ValueError) as error:
        if "\n" in str(error) or len(str(error)) > 400 or not str(error):
            return f"{entry} {name}: not a line: {str(error)[:200]!r}"
        return None
    except Exception as error:
        text = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        return f"{entry} {name}={_shown(wrong)}: {text}"
    return f"{entry} {name}={_shown(wrong)}: no error"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {value.dtype} {value.device} {value.layout}"
    return (
        repr(value)[:60] if not isinstance(value, int) else f"integer of {value.bit_length()} bits"
    )
