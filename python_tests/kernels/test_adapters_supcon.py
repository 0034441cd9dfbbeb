"""SupCon where its loss is next to nothing, and differentiated more than once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import TARGETS, Target
from support.rounding import spreads
from support.tolerances import EXACT, SAME_GRADIENT, check_all, check_same
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels.adapters.metric_learning import CrossBatchMemory, NTXentLoss, SupConLoss

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_pair_loss = pytest.mark.parametrize("cls", [NTXentLoss, SupConLoss])
FORMS = ["batch", "references", "memory"]


def _views(
    noise: float, views: list[int], device: str, shared: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``views[i]`` close features of identity i; ``shared``: what all have in common."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(len(views), 64, generator=generator) + shared
    labels = torch.repeat_interleave(torch.arange(len(views)), torch.tensor(views))
    feats = centers[labels] + noise * torch.randn(len(labels), 64, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return feats[order].to(device), labels[order].to(device)


def _formula(feats: Tensor, columns: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Each positive's share as softplus of a difference, exact however small, if there is one of a
    row; of several it is at least log 2, and a difference of logits will do.
    """
    z = F.normalize(feats, dim=1) @ F.normalize(columns, dim=1).T / temperature
    z = z.fill_diagonal_(-torch.inf)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    losses = []
    for row, positive in zip(z, same, strict=True):
        if positive.any() and torch.isfinite(row).sum() > 1:
            places = positive.nonzero().flatten()
            if len(places) == 1:
                rest = row.index_fill(0, places, -torch.inf).logsumexp(0) - row[places]
                losses.append(F.softplus(rest).mean())
            else:
                losses.append((row.logsumexp(0) - row[places]).mean())
    return torch.stack(losses).mean()


def _call(form: str, module: SupConLoss, feats: Tensor, labels: Tensor) -> Tensor:
    if form == "batch":
        return module(feats, labels)
    if form == "references":
        return module(feats, labels, ref_emb=feats, ref_labels=labels)
    return CrossBatchMemory(module, feats.shape[1], len(feats))(feats, labels)


@each_target
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("noise", "temperature", "views", "shared"),
    [
        (0.01, 0.05, [2] * 8, 0.0),
        (0.3, 0.07, [2] * 8, 0.0),
        # All features alike: the negatives' share is large.
        (0.3, 0.07, [2] * 8, 5.0),
        # One, none, two and more positives side by side.
        (0.05, 0.05, [2, 2, 1, 3, 2, 1, 5], 0.0),
        (0.3, 0.5, [1, 2, 4], 0.0),
        # No anchor has a negative but the single one.
        (0.1, 0.1, [3, 1], 0.0),
    ],
)
def test_small_losses_are_exact(
    target: Target, form: str, noise: float, temperature: float, views: list[int], shared: float
) -> None:
    feats, labels = _views(noise, views, target.device, shared)
    if target.interpreted and form != "batch" and len(views) == 8:
        pytest.skip("its tiles are the batch's, and other views show its counts")
    module = SupConLoss(temperature, backend=target.backend)

    def formula(x: Tensor) -> Tensor:
        # What a memory holds has no gradient.
        return _formula(x, x.detach() if form == "memory" else x, labels, temperature)

    def evaluated(loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        x = feats.to(dtype, copy=True).requires_grad_()
        value = loss(x)
        return {"loss": value.detach(), "gradient": torch.autograd.grad(value, x)[0]}

    want = spreads(lambda: evaluated(formula, torch.float64))
    check_all(evaluated(lambda x: _call(form, module, x, labels), torch.float32), want)


@each_target
def test_anchors_count_however_small_their_loss(target: Target) -> None:
    """Half of the anchors' losses are zero but for rounding; the mean is over all of them."""
    feats, labels = _views(1e-3, [2] * 6, target.device)
    wide, some = feats.double(), labels < 3
    near = _formula(wide[some], wide[some], labels[some], 0.01)
    assert 0.0 < float(near) < 1e-12
    far = feats.clone()
    # The other identities' views are of no use, so that their anchors have a large loss.
    far[labels >= 3] = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(far)
    want = _formula(far.double(), far.double(), labels, 0.01)
    got = SupConLoss(0.01, backend=target.backend)(far, labels)
    check_same("loss", got, want, SAME_GRADIENT)


@each_pair_loss
@pytest.mark.parametrize("form", ["batch", "references"])
def test_reference_has_derivatives_of_any_order_and_transforms(cls: type, form: str) -> None:
    feats, labels = _views(0.3, [2, 3, 1, 2], "cpu")
    feats = feats[:, :5].double().requires_grad_()
    module = cls(0.5, backend="reference")

    def loss(x: Tensor) -> Tensor:
        return _call(form, module, x, labels)

    (first,) = torch.autograd.grad(loss(feats), feats, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), feats, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), feats)
    assert bool(third.isfinite().all())
    assert bool(third.any())
    direction = torch.randn_like(feats)
    _, along = torch.func.jvp(loss, (feats.detach(),), (direction,))
    check_same("derivative", along, (first * direction).sum().detach(), EXACT)
    hessian = torch.func.hessian(loss)(feats.detach())
    of_square = 2.0 * torch.einsum("ab,abcd->cd", first.detach(), hessian)
    check_same("second derivative", of_square, second.detach(), EXACT)
