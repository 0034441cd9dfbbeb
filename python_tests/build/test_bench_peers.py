"""Adapters of other packages' losses, with eager stand-ins of the same signatures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from bench.baselines import peers

PAIR = SimpleNamespace(loss="uss", columns=0)
CLASSES = SimpleNamespace(loss="margin_softmax", columns=29)
CASES = [
    (name, workload) for workload in (PAIR, CLASSES) for name in peers.peer_losses(workload, "cuda")
]
#: Modules that the packages are imported from, where their name differs.
MODULES = {"cut-cross-entropy-exact": "cut_cross_entropy", "torch-linear-cross-entropy": "torch"}


def case_name(value: object) -> str:
    return value if isinstance(value, str) else "pair" if value is PAIR else "class"


cases = pytest.mark.parametrize(("name", "workload"), CASES, ids=case_name)


def inputs(workload: SimpleNamespace, size: int = 96) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    feats = 20 * torch.randn(17, size, generator=generator)
    labels = torch.randint(0, 29, (17,), generator=generator)
    if not workload.columns:
        return {"feats": feats, "labels": labels, "b": torch.tensor(5.0)}
    return {"feats": feats, "weight": torch.randn(29, size, generator=generator), "labels": labels}


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Callable) -> None:
    for end in range(1, name.count(".") + 1):
        parent = ".".join(name.split(".")[:end])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Computation of each package, with its parameters by name and in its order."""
    seen: list[tuple[str, object]] = []

    def liger(input, weight, target, bias=None, ce_weight=None, reduction="mean"):
        seen.append(("liger-kernel", None))
        return F.cross_entropy(input @ weight.T, target, reduction=reduction)

    def cut(e, c, targets, reduction="mean", filter_eps="high"):
        seen.append(("cut-cross-entropy", filter_eps))
        return F.cross_entropy(e @ c.T, targets, reduction=reduction)

    def contrastive(q, k, labels=None, scale=None, head_dim=256):
        seen.append(("inf-cl", head_dim))
        heads = [t.view(t.shape[0], -1, head_dim).float() for t in (scale * q, k)]
        return F.cross_entropy(torch.einsum("mhd,nhd->mn", *heads), labels, reduction="none")

    def chunked(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
        seen.append(("quack", None))
        logits = x @ weight.T
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    def library(input, linear_weight, target, *, options=None):
        seen.append(("torch-linear-cross-entropy", options))
        return F.cross_entropy(input @ linear_weight.T, target)

    def siglip(img_features, txt_features, log_temperature, bias):
        seen.append(("siglip-kernel", None))
        logits = log_temperature.exp() * img_features @ txt_features.T + bias
        targets = torch.eye(len(logits))
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)

    _module(
        monkeypatch,
        "liger_kernel.transformers.functional",
        liger_fused_linear_cross_entropy=liger,
    )
    _module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cut)
    _module(monkeypatch, "inf_cl", cal_flash_loss=contrastive)
    _module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=chunked)
    _module(monkeypatch, "siglip_kernel", fused_siglip_loss=siglip)
    monkeypatch.setattr(F, "linear_cross_entropy", library, raising=False)
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "chunks", raising=False)
    return seen


@cases
def test_adapters_compute_their_formula(
    stand_ins: list, name: str, workload: SimpleNamespace
) -> None:
    found = {}
    for kind, loss in (
        ("peer", peers.peer_losses(workload, "cuda")[name]),
        ("oracle", peers.oracle(workload, name)),
    ):
        given = inputs(workload)
        leaves = [t.requires_grad_() for k, t in given.items() if k in ("feats", "weight")]
        if peers.PEERS[name].sigmoid:
            leaves.append(given["b"].requires_grad_())
        value = loss(**given)
        found[kind] = (value.detach(), torch.autograd.grad(value, leaves))
    (got, gradients), (want, wanted) = found["peer"], found["oracle"]
    # The scale of the sigmoid is given as its logarithm, rounded to float32.
    limits = (1e-6, 1e-6) if peers.PEERS[name].sigmoid else (SAME_LOSS, SAME_GRADIENT)
    check_same("loss", got, want, limits[0])
    assert float(want) > 1.0  # not a formula that is all but zero
    for gradient, expected in zip(gradients, wanted, strict=True):
        check_same("gradient", gradient, expected, limits[1])
    (call,) = stand_ins
    options = {
        "cut-cross-entropy": "high",
        "inf-cl": 32,  # 96 = 3 x 32
        "torch-linear-cross-entropy": "chunks",
    }
    assert call == (name.removesuffix("-exact"), options.get(name))


def test_inf_cl_takes_no_more_than_its_slice_of_d(stand_ins: list) -> None:
    peers.peer_losses(PAIR, "cuda")["inf-cl"](**inputs(PAIR, size=1024))
    assert stand_ins == [("inf-cl", 256)]


def test_no_peer_where_the_work_differs() -> None:
    for loss, columns in (("uss", 100), ("uce", 100)):
        workload = SimpleNamespace(loss=loss, columns=columns)
        assert peers.peer_losses(workload, "cuda") == {}
    assert [*peers.peer_losses(PAIR, "cpu")] == ["torch-linear-cross-entropy"]


def test_a_missing_package_is_an_import_error_of_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("liger_kernel", "cut_cross_entropy", "inf_cl", "quack", "siglip_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for loss in peers.peer_losses(PAIR, "cuda").values():
        with pytest.raises(ImportError):
            loss(**inputs(PAIR))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@cases
def test_packages_compute_their_formula(name: str, workload: SimpleNamespace) -> None:
    """The real ones, in bfloat16: what they round decides, not their formula."""
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except ImportError as error:
        pytest.skip(str(error))
    given = {
        k: v.cuda().bfloat16() if v.dim() == 2 else v.cuda()
        for k, v in inputs(workload, size=512).items()
    }
    given["feats"].requires_grad_()
    value = peers.peer_losses(workload, "cuda")[name](**given)
    (gradient,) = torch.autograd.grad(value, given["feats"])
    want = peers.oracle(workload, name)(**given)
    (expected,) = torch.autograd.grad(want, given["feats"])
    check_same("loss", value.detach(), want.detach(), 3e-2)
    check_same("gradient", gradient, expected, 1e-1)
