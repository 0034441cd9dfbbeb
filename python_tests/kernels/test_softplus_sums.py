"""The CPU's sums of softplus, one logarithm for many pairs: the kernel against float64."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels.backends.native import loader

# Scale 1 and margin 0: a logit is a cosine less its threshold.
CONSTANTS = {"uss": [1.0, 0.0], "uce": [1.0, 1.0, 0.0, 0.3, -1.0]}
WEIGHTS = {"uss": (1.0, 1.0), "uce": (1.0, 0.3)}
# Ends of the logits. At 0 a factor is 2, the largest; below -17, 1 + e is 1 in float32.
LOGITS = {
    "zero": (0, 0),
    "far": (-30, -18),
    "tiny": (-80, -60),
    "large": (40, 1000),
    "all": (-40, 40),
}
# A part of a vector; several products per row, and a rest; several units of rows.
SIZES = [(3, 5), (70, 2100)]


def _multiples(size: tuple[int, ...], low: float, high: float, seed: int) -> Tensor:
    """Multiples of 1/64, whose differences are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(64 * low), int(64 * high) + 1, size, generator=generator) / 64


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize("both", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("per_column", [True, False], ids=["thresholds", "threshold"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("loss", CONSTANTS)
def test_sums_of_softplus(
    loss: str, size: tuple[int, int], logits: str, per_column: bool, both: bool, gradient: bool
) -> None:
    if loss == "uce" and per_column and both:
        pytest.skip("rows of a loss over classes have no threshold")
    native = loader.extension()
    n, m = size
    a_labels, b_labels = ((torch.arange(count, dtype=torch.int32) * 5) % 7 - 1 for count in size)
    valid = (a_labels >= 0)[:, None] & (b_labels >= 0)
    positive = a_labels[:, None] == b_labels
    # Of positives, softplus is of the negative logit.
    cosines = _multiples(size, *LOGITS[logits], 1) * torch.where(positive, -1, 1)
    cosines[~valid] = torch.nan
    shift = (-1, 1) if logits == "all" else (0, 0)
    a_threshold, b_threshold = (_multiples((count,), *shift, 2) for count in size)
    if not per_column:
        a_threshold = b_threshold = b_threshold[:1]
    a_weights, b_weights = (0.5 + _multiples((count,), 0, 1, 3) for count in size)
    sums = {
        f"{side}_{name}": torch.zeros(count, dtype=torch.float64)
        for name in ("loss", "dthreshold")
        for side, count in zip("ab", size, strict=True)
    }
    found = torch.zeros(size)
    given = {
        "cosines": cosines, "a_labels": a_labels, "b_labels": b_labels, "a_weights": a_weights,
        "a_threshold": a_threshold, "b_threshold": b_threshold, "a_loss": sums["a_loss"],
        "b_dthreshold": sums["b_dthreshold"], "a_dthreshold": sums["a_dthreshold"],
    }  # fmt: skip
    if both:
        given |= {"b_loss": sums["b_loss"], "b_weights": b_weights}
    if gradient:
        given["gradient"] = found
    tile = native.CpuSumTile(
        n=n, m=m, stride=m, diagonal=native.NO_DIAGONAL, mirrored=both, per_column=per_column,
        **given,
    )  # fmt: skip
    native.cpu.sum_tile(loss, CONSTANTS[loss], tile, 2)

    sign = torch.where(positive, -1.0, 1.0).double()
    weight = torch.where(positive, *WEIGHTS[loss]).double()
    directions = []
    for threshold in (b_threshold[None, :], a_threshold[:, None]):
        z = sign * (cosines.double() - threshold)
        value = weight * (z.clamp(min=0) + torch.log1p(torch.exp(-z.abs())))
        slope = weight * sign * torch.sigmoid(z)
        directions += [x.where(valid, 0.0) for x in (value, slope)]
    forth, forth_slope, back, back_slope = directions
    forth_slope, back_slope = a_weights[:, None] * forth_slope, both * b_weights * back_slope
    check_same("a_loss", sums["a_loss"], forth.sum(1), SAME_LOSS)
    if both:
        check_same("b_loss", sums["b_loss"], back.sum(0), SAME_LOSS)
    if gradient:
        check_same("gradient", found, forth_slope + back_slope, SAME_LOSS)
        assert not bool(found[~valid].any())
    if per_column:
        check_same("b_dthreshold", sums["b_dthreshold"], -forth_slope.sum(0), SAME_LOSS)
        check_same("a_dthreshold", sums["a_dthreshold"], -back_slope.sum(1), SAME_LOSS)
    else:
        total = -(forth_slope + back_slope).sum()
        size_of_terms = (forth_slope + back_slope).abs().sum()
        assert (sums["b_dthreshold"][0] - total).abs() <= SAME_LOSS * size_of_terms


def test_thresholds_of_rows_need_a_loss_that_has_them() -> None:
    native = loader.extension()
    given = {
        "cosines": torch.zeros(2, 3), "a_labels": torch.zeros(2, dtype=torch.int32),
        "b_labels": torch.zeros(3, dtype=torch.int32), "a_threshold": torch.zeros(2),
        "b_threshold": torch.zeros(3), "a_loss": torch.zeros(2, dtype=torch.float64),
        "b_loss": torch.zeros(3, dtype=torch.float64),
    }  # fmt: skip
    tile = native.CpuSumTile(
        n=2, m=3, stride=3, diagonal=native.NO_DIAGONAL, per_column=True, mirrored=True, **given
    )
    with pytest.raises(ValueError, match="rows of this loss have no threshold"):
        native.cpu.sum_tile("uce", CONSTANTS["uce"], tile, 1)


def test_a_cosine_that_is_not_a_number() -> None:
    """The loss of its row and of its column is none, that of the others is."""
    native = loader.extension()
    cosines = torch.zeros(3, 700)
    cosines[1, 650] = torch.nan
    labels = torch.zeros(3, dtype=torch.int32), torch.ones(700, dtype=torch.int32)
    losses = torch.zeros(3, dtype=torch.float64), torch.zeros(700, dtype=torch.float64)
    given = {
        "cosines": cosines, "a_labels": labels[0], "b_labels": labels[1],
        "b_threshold": torch.zeros(1), "a_loss": losses[0], "b_loss": losses[1],
    }  # fmt: skip
    tile = native.CpuSumTile(n=3, m=700, stride=700, diagonal=native.NO_DIAGONAL, **given)
    native.cpu.sum_tile("uss", CONSTANTS["uss"], tile, 1)
    assert losses[0].isnan().tolist() == [False, True, False]
    assert losses[1].isnan().nonzero().tolist() == [[650]]
