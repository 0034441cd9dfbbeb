"""IResNet and LResNet: names, shapes and outputs of the published backbones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import training  # noqa: F401  (puts the repository root on the path)

from train.backbones import STAGES, backbone_names, build_backbone

DATA = Path(__file__).resolve().parents[1] / "data"
SHAPES = json.loads((DATA / "backbone_state_dicts.json").read_text())
OUTPUTS = dict(np.load(DATA / "backbone_outputs.npz"))


def published_input() -> torch.Tensor:
    flat = torch.arange(2 * 3 * 112 * 112, dtype=torch.float64)
    return torch.sin(0.011 * flat).view(2, 3, 112, 112).float()


def fill(state: dict[str, torch.Tensor]) -> None:
    """Deterministic parameters: a sine over the flat index, its phase by sorted key order."""
    floating = [key for key in sorted(state) if state[key].is_floating_point()]
    for k, key in enumerate(floating):
        tensor = state[key]
        w = torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + k)
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


@pytest.mark.parametrize("name", STAGES)
def test_state_dict_has_the_published_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = build_backbone(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == SHAPES[name]


@pytest.mark.parametrize("name", [n for n in STAGES if n in OUTPUTS])
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
    with torch.device("meta"):
        state = build_backbone("lresnet50e_ir").state_dict()
    published = SHAPES["unitsface_lresnet50eir"]
    losses = [key for key in published if key.startswith("sample_to_")]
    assert len(losses) == 3
    expected = {key: shape for key, shape in published.items() if key not in losses}
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("name", ["iresnet18", "lresnet50e_ir", "conv4"])
@pytest.mark.parametrize(("size", "embedding_size"), [(31, 64), (48, 100)])
def test_features_of_any_number_from_images_of_any_size(
    name: str, size: int, embedding_size: int
) -> None:
    model = build_backbone(name, size, 0.0, embedding_size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, embedding_size)


def test_every_name_builds() -> None:
    sizes = {}
    for name in backbone_names():
        with torch.device("meta"):
            model = build_backbone(name)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert len(sizes) == 13
    for family in ("iresnet{}", "lresnet{}e_ir"):
        parameters = [sizes[family.format(depth)] for depth in (50, 100, 200)]
        assert parameters == sorted(parameters)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_input_size_changes_only_the_last_linear_layer(size: int) -> None:
    with torch.device("meta"):
        state = build_backbone("iresnet18", input_size=size).state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    differing = [key for key in shapes if shapes[key] != SHAPES["iresnet18"][key]]
    assert differing == ["fc.weight"]
    model = build_backbone("iresnet18", input_size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 512)


def test_last_scale_is_fixed_and_features_stay_float32_under_autocast() -> None:
    model = build_backbone("iresnet18", input_size=16)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["features.weight"]
    assert torch.equal(model.features.weight, torch.ones(512))
    with torch.autocast("cpu", torch.bfloat16):
        features = model(torch.randn(4, 3, 16, 16))
    assert features.dtype == torch.float32
    # BatchNorm in training mode: every coordinate has zero mean over the batch.
    assert features.mean(0).abs().max() < 1e-4


def test_dropout_acts_in_training_only() -> None:
    model = build_backbone("iresnet18", input_size=16, dropout=0.5).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.dropout.train()
        assert not torch.equal(model(images), model(images))
