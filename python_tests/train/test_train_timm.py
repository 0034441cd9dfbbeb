"""Models of timm: the embedding head, their options, and the error where timm is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.training import assert_same_state, tiny, train, trainer_of, write_faces
from torch import Tensor, nn

from train import checkpoint
from train.backbones import TimmBackbone, build_backbone
from train.config import make_config
from train.errors import UserError


class SmallViT(nn.Module):
    """Output of a timm model in the harness: (N, 3, S, S) to (N, D), or to tokens unpooled."""

    def __init__(self, img_size: int, patch_size: int, width: int, global_pool: str) -> None:
        super().__init__()
        self.img_size, self.global_pool = img_size, global_pool
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.img_size:
            raise AssertionError(f"input size {x.shape[-1]}, expected {self.img_size}")
        x = self.norm(self.block(self.proj(x).flatten(2).transpose(1, 2)))
        return x.mean(1) if self.global_pool == "avg" else x


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A module ``timm`` with one model; the arguments of every call."""
    made: list[tuple[str, dict[str, Any]]] = []

    def create_model(
        name: str,
        pretrained: bool,
        num_classes: int,
        img_size: int = 224,
        patch_size: int = 16,
        global_pool: str = "avg",
    ) -> nn.Module:
        if name != "small_vit":
            raise RuntimeError(f"Unknown model ({name})")
        assert not pretrained
        assert num_classes == 0
        made.append((name, {"img_size": img_size, "patch_size": patch_size}))
        return SmallViT(img_size, patch_size, 8, global_pool)

    fake = ModuleType("timm")
    fake.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    return made


OPTIONS = {"img_size": 16, "patch_size": 8}


def test_options_reach_timm_and_the_head_maps_what_comes_out(calls: list[Any]) -> None:
    pooled = build_backbone("timm:small_vit", 16, 0.0, 24, OPTIONS)
    tokens = build_backbone("timm:small_vit", 16, 0.0, 24, {**OPTIONS, "global_pool": ""})
    assert calls == [("small_vit", OPTIONS)] * 2
    assert isinstance(pooled, TimmBackbone)
    assert isinstance(tokens, TimmBackbone)
    assert (pooled.fc.in_features, tokens.fc.in_features) == (8, 4 * 8)
    for model in (pooled, tokens):
        assert model.model.training  # as it was before the head's width was looked for
        with torch.autocast("cpu", torch.bfloat16):
            features = model(torch.randn(4, 3, 16, 16))
        assert features.shape == (4, 24)
        assert features.dtype == torch.float32
        assert features.mean(0).abs().max() < 1e-5
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
            "features.weight"
        ]


@pytest.mark.parametrize("sharded", ["never", "always"])
def test_trains_with_adamw_and_resumes_bit_for_bit(
    calls: list[Any], tmp_path: Path, sharded: str
) -> None:
    faces = write_faces(tmp_path / "faces", identities=3, images=4)
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": "timm:small_vit", "embedding_size": 24, "options": OPTIONS},
        "train": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1, "batch_size": 6},
        "partial_fc": {"enabled": sharded},
    }
    whole = train(tiny(faces, tmp_path / "whole", **sections))
    assert whole.total_steps == 4
    assert isinstance(whole.optimizer, torch.optim.AdamW)
    part = train(tiny(faces, tmp_path / "part", **sections), stop_after=2)
    path = checkpoint.last(tmp_path / "part")
    again = trainer_of(part.config)
    again.load_state(checkpoint.read_run(path), path)
    assert again.fit(tmp_path / "part")
    assert_same_state(dict(again.backbone.state_dict()), dict(whole.backbone.state_dict()))
    before = build_backbone("timm:small_vit", 16, 0.0, 24, OPTIONS).state_dict()
    assert not torch.equal(
        before["model.proj.weight"], whole.backbone.state_dict()["model.proj.weight"]
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:big_vit", {}, r"model\.name=timm:big_vit: Unknown model \(big_vit\)"),
        ("timm:small_vit", {"depth": 3}, r"options=\{'depth': 3\}: .*'depth'"),
        ("timm:small_vit", {"pretrained": True}, r"model\.options\.pretrained"),
        ("timm:small_vit", {}, "takes no images of model.input_size=16 .*img_size=16"),
    ],
)
def test_mistakes_name_the_key(
    calls: list[Any], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_backbone(name, 16, 0.0, 24, options)
    assert "\n" not in str(caught.value)


def test_names_and_options_are_checked_without_timm() -> None:
    def config(**model: Any) -> None:
        make_config(("test", {"model": model}))

    config(name="timm:anything", options={"img_size": 112})
    with pytest.raises(UserError, match=r"model\.name: expected one of iresnet18, .*'timm:'"):
        config(name="timm:")
    with pytest.raises(UserError, match=r"model\.options: iresnet18 takes none"):
        config(name="iresnet18", options={"img_size": 112})


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'torchvision'"), RuntimeError("operator torchvision::nms")],
)
def test_missing_torchvision_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "timm":
                raise error

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    message = f"model.name=timm:vit: timm needs torchvision, and cannot be imported here: {error}"
    with pytest.raises(UserError, match=message):
        build_backbone("timm:vit")


def test_real_vit_on_all_of_its_tokens() -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm needs torchvision, and cannot be imported here: {error}")
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "class_token": False,
        "global_pool": "",
    }
    model = build_backbone("timm:vit_tiny_patch16_224", 32, 0.0, 64, options)
    assert isinstance(model, TimmBackbone)
    assert model.fc.in_features == 16 * 48
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
