"""Names, shapes, sizes and outputs of the published backbones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support import training  # noqa: F401  (puts the repository root on the path)
from support.grid import extended_if
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train.backbones import STAGES, backbone_names, build_backbone
from train.backbones.weights import recognize, sizes

DATA = Path(__file__).resolve().parents[1] / "data"
SHAPES = json.loads((DATA / "backbone_state_dicts.json").read_text())
OUTPUTS = dict(np.load(DATA / "backbone_outputs.npz"))


@cache
def without_values(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name)


def published_input() -> torch.Tensor:
    flat = torch.arange(2 * 3 * 112 * 112, dtype=torch.float64)
    return torch.sin(0.011 * flat).view(2, 3, 112, 112).float()


def fill(state: dict[str, torch.Tensor]) -> None:
    """Deterministic parameters: a sine over the flat index, its phase by sorted key order.

    Noise for MobileFaceNet, whose features then depend on the image.
    """
    floating = [key for key in sorted(state) if state[key].is_floating_point()]
    noise = np.random.RandomState(0) if "conv_sep.layers.0.weight" in state else None
    for k, key in enumerate(floating):
        tensor = state[key]
        w = torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + k)
        if noise is not None:
            w = torch.from_numpy(noise.standard_normal(tensor.numel()))
        w = w.view(tensor.shape)
        if key.endswith("running_var"):
            value = 1 + w.abs() / 2
        elif tensor.dim() > 1:
            value = w / (tensor.numel() / tensor.shape[0]) ** 0.5
        elif key.endswith("weight"):
            value = 1 + w / 10
        else:
            value = w / 10
        tensor.copy_(value)


@pytest.mark.parametrize("name", [*STAGES, "mobilefacenet"])
def test_state_dict_has_the_published_keys_and_shapes(name: str) -> None:
    state = without_values(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == SHAPES[name]


# Depths of a family differ in the number of their blocks alone, as the names of their tensors do.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=extended_if(name not in ("iresnet18", "mobilefacenet")))
        for name in (*STAGES, "mobilefacenet")
        if name in OUTPUTS
    ],
)
def test_outputs_match_the_published_model(name: str) -> None:
    with torch.device("meta"):  # no initial values, all of which are replaced
        model = build_backbone(name).eval()
    model.to_empty(device="cpu")
    fill(model.state_dict())
    with torch.no_grad():
        output = model(published_input())
    expected = torch.from_numpy(OUTPUTS[name])
    assert (output - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_lresnet_has_the_published_tensors_without_the_losses() -> None:
    state = without_values("lresnet50e_ir").state_dict()
    published = SHAPES["unitsface_lresnet50eir"]
    losses = [key for key in published if key.startswith("sample_to_")]
    assert len(losses) == 3
    expected = {key: shape for key, shape in published.items() if key not in losses}
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize(
    "name", ["iresnet18", "lresnet50e_ir", "conv4", "mobilefacenet", "ghostfacenet"]
)
@pytest.mark.parametrize(("size", "embedding_size"), [(31, 64), (48, 100)])
def test_features_of_any_number_from_images_of_any_size(
    name: str, size: int, embedding_size: int
) -> None:
    model = build_backbone(name, size, 0.0, embedding_size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, embedding_size)


def test_every_name_builds() -> None:
    sizes = {n: sum(p.numel() for p in without_values(n).parameters()) for n in backbone_names()}
    assert len(sizes) == 17
    for family in ("iresnet{}", "lresnet{}e_ir"):
        parameters = [sizes[family.format(depth)] for depth in (50, 100, 200)]
        assert parameters == sorted(parameters)


# Parameters and multiplications with additions, in millions. mobilefacenet_1x: Chen et al. 2018,
# section 3.2 (0.99 M without BatchNorm's). Others: README of insightface's arcface_torch ("0.45G");
# GhostFaceNetV1-1 with the stored means and variances, which Keras counts among parameters.
@pytest.mark.parametrize(
    ("name", "embedding_size", "parameters", "multiplications"),
    [
        ("mobilefacenet_1x", 128, 0.99, 221),
        ("mobilefacenet", 512, 2.06, 450),
        ("mobilefacenet_large", 512, 6.31, None),
        ("ghostfacenet", 512, 4.09, 216),
    ],
)
def test_small_backbones_have_the_published_size(
    name: str, embedding_size: int, parameters: float, multiplications: int | None
) -> None:
    with torch.device("meta"):
        model = build_backbone(name, 112, 0.0, embedding_size).eval()
    tensors = [*model.parameters(), *(model.buffers() if name == "ghostfacenet" else ())]
    count = sum(t.numel() for t in tensors if t.is_floating_point())
    assert count == pytest.approx(1e6 * parameters, rel=0.015)
    if multiplications is None:
        return
    model.to_empty(device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 112, 112))
    assert counter.get_total_flops() / 2 == pytest.approx(1e6 * multiplications, rel=0.03)


@pytest.mark.parametrize(
    "name", ["mobilefacenet", "mobilefacenet_1x", "mobilefacenet_large", "ghostfacenet"]
)
@pytest.mark.parametrize(("size", "embedding_size"), [(112, 512), (64, 128)])
def test_small_backbones_are_recognized_by_their_tensors(
    name: str, size: int, embedding_size: int
) -> None:
    with torch.device("meta"):
        state = build_backbone(name, size, 0.0, embedding_size).state_dict()
    assert (recognize(state), sizes(state)) == (name, (size, embedding_size))


@pytest.mark.parametrize("size", [16, 33, 64])
def test_input_size_changes_only_the_last_linear_layer(size: int) -> None:
    with torch.device("meta"):
        state = build_backbone("iresnet18", input_size=size).state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    differing = [key for key in shapes if shapes[key] != SHAPES["iresnet18"][key]]
    assert differing == ["fc.weight"]
    model = build_backbone("iresnet18", input_size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 512)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "ghostfacenet"])
def test_last_scale_is_fixed_and_features_stay_float32_under_autocast(name: str) -> None:
    model = build_backbone(name, input_size=16)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    last = "features.layers.3.weight" if name == "mobilefacenet" else "features.weight"
    assert [*frozen] == [last]
    assert torch.equal(frozen[last], torch.ones(512))
    with torch.autocast("cpu", torch.bfloat16):
        features = model(torch.randn(4, 3, 16, 16))
    assert features.dtype == torch.float32
    # BatchNorm in training mode: every coordinate has zero mean over the batch.
    assert features.mean(0).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["iresnet18", "mobilefacenet", pytest.param("ghostfacenet", marks=pytest.mark.extended)]
)
def test_dropout_acts_in_training_only(name: str) -> None:
    model = build_backbone(name, input_size=16, dropout=0.5).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        (model.features if name == "mobilefacenet" else model).dropout.train()
        assert not torch.equal(model(images), model(images))
